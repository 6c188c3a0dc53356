"""The layer, and the gradients of the data: from rows to rows, the code never leaving the program.

forward    U = X Weᵀ + be,  Z = f(U),  Y = Z Wdᵀ + bd (+ X)
backward   dU = (dY Wd) ⊙ f′(U),  dX = dU We (+ dY);   the sums over rows are :func:`.collect.collect`'s
the loss   dX = c (dU We − R),  dT = −c R,  R = Z Wdᵀ + bd − T
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import activate, dot, matrix, narrow, put, slope_of, vector
from .encode import FRESH_COLUMNS


@triton.jit
def project(
    left, right, n, k, rows, features, rank, left_row, left_column, right_row, right_column,
    TF32: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``left[n] @ right`` for a ``right`` of RANK columns, begun afresh every so many features."""
    total = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for chunk in range(0, features, FRESH_COLUMNS):
        part = tl.zeros([ROWS, RANK], dtype=tl.float32)
        for first in range(chunk, min(chunk + FRESH_COLUMNS, features), COLUMNS):
            d = first + tl.arange(0, COLUMNS)
            a = matrix(left, n, d, left_row, left_column, rows, features, TF32)
            b = matrix(right, d, k, right_row, right_column, features, rank, TF32)
            part = dot(a, b, part, PRECISION)
        total += part
    return total


@triton.jit
def forward(
    x, encoder, decoder, encoder_bias, decoder_bias, output, wide_code,
    rows, in_features, out_features, rank,
    x_row, x_column, encoder_row, encoder_column, decoder_row, decoder_column,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, HAS_ENCODER_BIAS: tl.constexpr, HAS_DECODER_BIAS: tl.constexpr,
    STORE_WIDE: tl.constexpr, TF32: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows; ``wide_code`` keeps U for the backward pass."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    u = project(
        x, encoder, n, k, rows, in_features, rank, x_row, x_column, encoder_column, encoder_row,
        TF32, PRECISION, ROWS, COLUMNS, RANK,
    )  # fmt: skip
    u += vector(encoder_bias, k, rank, HAS_ENCODER_BIAS)[None, :]
    if STORE_WIDE:
        put(wide_code, u, n, k, rank, 1, rows, rank)
    z = narrow(activate(u, ACTIVATION), output.dtype.element_ty, TF32)
    for first in range(0, out_features, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        weight = matrix(decoder, d, k, decoder_row, decoder_column, out_features, rank, TF32)
        y = dot(z, tl.trans(weight), tl.zeros([ROWS, COLUMNS], dtype=tl.float32), PRECISION)
        y += vector(decoder_bias, d, out_features, HAS_DECODER_BIAS)[None, :]
        if RESIDUAL:
            y += matrix(x, n, d, x_row, x_column, rows, in_features, False).to(tl.float32)
        put(output, narrow(y, output.dtype.element_ty, False), n, d, out_features, 1, rows, out_features)


@triton.jit
def backward(
    grad, encoder, decoder, wide_code, code, slope, slope_sums, d_input,
    rows, in_features, out_features, rank,
    grad_row, grad_column, encoder_row, encoder_column, decoder_row, decoder_column,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, STORE: tl.constexpr, INPUT: tl.constexpr,
    TF32: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows. STORE: Z and dU, of which the weight gradients are made; INPUT: dX."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    du = project(
        grad, decoder, n, k, rows, out_features, rank, grad_row, grad_column, decoder_row, decoder_column,
        TF32, PRECISION, ROWS, COLUMNS, RANK,
    )  # fmt: skip
    u = matrix(wide_code, n, k, rank, 1, rows, rank, False)
    du *= slope_of(u, ACTIVATION)
    if STORE:
        # Not of what is rounded below: these are sums that it would bias.
        tl.store(slope_sums + tl.program_id(0) * rank + k, tl.sum(du, axis=0), mask=k < rank)
    du = narrow(du, slope.dtype.element_ty, TF32)
    if STORE:
        z = tl.where((n < rows)[:, None], activate(u, ACTIVATION), 0.0)
        put(code, narrow(z, code.dtype.element_ty, TF32), n, k, rank, 1, rows, rank)
        put(slope, du, n, k, rank, 1, rows, rank)
    if INPUT:
        for first in range(0, in_features, COLUMNS):
            d = first + tl.arange(0, COLUMNS)
            weight = matrix(encoder, k, d, encoder_row, encoder_column, rank, in_features, TF32)
            dx = dot(du, weight, tl.zeros([ROWS, COLUMNS], dtype=tl.float32), PRECISION)
            if RESIDUAL:
                dx += matrix(grad, n, d, grad_row, grad_column, rows, in_features, False).to(tl.float32)
            put(d_input, narrow(dx, d_input.dtype.element_ty, False), n, d, in_features, 1, rows, in_features)


@triton.jit
def data_gradients(
    target, encoder, decoder, decoder_bias, wide_code, wide_slope, scale, d_input, d_target,
    rows, in_features, out_features, rank,
    target_row, target_column, encoder_row, encoder_column, decoder_row, decoder_column,
    JOINT: tl.constexpr, INPUT: tl.constexpr, TARGET: tl.constexpr, HAS_DECODER_BIAS: tl.constexpr,
    TF32: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Program (r, c): rows r, columns c of dX and of dT. The scale c comes last, from the device."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, RANK)
    c = tl.load(scale).to(tl.float32)
    residual = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if JOINT or TARGET:
        z = matrix(wide_code, n, k, rank, 1, rows, rank, False)
        weight = tl.trans(matrix(decoder, d, k, decoder_row, decoder_column, out_features, rank, TF32))
        t_tile = matrix(target, n, d, target_row, target_column, rows, out_features, TF32)
        residual = vector(decoder_bias, d, out_features, HAS_DECODER_BIAS)[None, :] - t_tile.to(tl.float32)
        # R is a small difference: the code is taken in two parts, as if it had not been rounded.
        high = narrow(z, weight.dtype, TF32)
        residual = dot(high, weight, residual, PRECISION)
        if TF32 or weight.dtype != tl.float32:
            low = narrow(z - high.to(tl.float32), weight.dtype, TF32)
            residual = dot(low, weight, residual, PRECISION)
    if INPUT:
        du = narrow(matrix(wide_slope, n, k, rank, 1, rows, rank, False), encoder.dtype.element_ty, TF32)
        weight = matrix(encoder, k, d, encoder_row, encoder_column, rank, in_features, TF32)
        start = -residual if JOINT else tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        dx = dot(du, weight, start, PRECISION) * c
        put(d_input, narrow(dx, d_input.dtype.element_ty, False), n, d, in_features, 1, rows, in_features)
    if TARGET:
        dt = narrow(-c * residual, d_target.dtype.element_ty, False)
        put(d_target, dt, n, d, out_features, 1, rows, out_features)
