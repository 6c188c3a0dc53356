"""Pass 1 of the training step: from a tile of rows to its code, the code's gradient and its share of the loss.

    U = X Weᵀ + be,  Z = f(U),  Q = T Wd − bd Wd,  E = Z G − Q,  dU = E ⊙ f′(U),  Σ R² = Σ A² + Σ Z ⊙ (E − Q)

A tile whose Σ R² is so small a part of Σ T² that this cancels is done again in the direct form, at once and by the same
program, so that nobody has to be asked: R = Z Wdᵀ + bd − T in blocks of columns, Σ R² and E = R Wd.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import activate, dot, matrix, narrow, put, slope_of, vector

# A float32 sum is begun afresh every so many columns: some matrix units truncate, and long sums would drift.
FRESH_COLUMNS = tl.constexpr(512)
# bfloat16 numbers that make up one of float32.
GRAM_PARTS = tl.constexpr(3)


@triton.jit
def prepare(
    decoder, decoder_bias, gram, offset,
    out_features, rank, decoder_row, decoder_column,
    HAS_DECODER_BIAS: tl.constexpr, TF32: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """G = Wdᵀ Wd and bd Wd. All rows share their errors, which do not average out: they are summed in float64.

    G is float32, or GRAM_PARTS matrices of bfloat16 that add up to it.
    """
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    products = tl.zeros([TILE, TILE], dtype=tl.float64)
    biases = tl.zeros([TILE], dtype=tl.float64)
    for first in range(0, out_features, BLOCK):
        d = first + tl.arange(0, BLOCK)
        left = matrix(decoder, d, i, decoder_row, decoder_column, out_features, rank, TF32).to(tl.float64)
        right = matrix(decoder, d, j, decoder_row, decoder_column, out_features, rank, TF32).to(tl.float64)
        # Sums of one element, through which Triton 3.6 does not look: it would lay float64 out as bfloat16, and fail.
        left, right = tl.sum(left[:, :, None], axis=2), tl.sum(right[:, :, None], axis=2)
        products = tl.dot(tl.trans(left), right, products, input_precision="ieee", out_dtype=tl.float64)
        if HAS_DECODER_BIAS:
            bias = vector(decoder_bias, d, out_features, True)
            biases += tl.sum(right * bias.to(tl.float64)[:, None], axis=0)
    if gram.dtype.element_ty == tl.float32:
        put(gram, products.to(tl.float32), i, j, rank, 1, rank, rank)
    else:
        for part in tl.static_range(GRAM_PARTS):
            high = narrow(products.to(tl.float32), tl.bfloat16, False)
            put(gram + part * rank * rank, high, i, j, rank, 1, rank, rank)
            products -= high.to(tl.float64)
    if tl.program_id(0) == 0:
        tl.store(offset + j, biases.to(tl.float32), mask=j < rank)


@triton.jit
def encode(
    x, target, encoder, decoder, encoder_bias, decoder_bias, gram, offset,
    code, slope, wide_code, wide_slope, slope_sums, losses, direct_tiles,
    rows, in_features, out_features, rank,
    x_row, x_column, target_row, target_column, encoder_row, encoder_column, decoder_row, decoder_column,
    ACTIVATION: tl.constexpr, JOINT: tl.constexpr, TIED: tl.constexpr,
    HAS_ENCODER_BIAS: tl.constexpr, HAS_DECODER_BIAS: tl.constexpr,
    STORE: tl.constexpr, STORE_WIDE: tl.constexpr,
    DIRECT_BELOW: tl.constexpr, TF32: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """One program a tile of ROWS rows. JOINT: the target is X. A DIRECT_BELOW of 0 leaves the direct form out."""
    tile = tl.program_id(0)
    n = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    u = tl.zeros([ROWS, RANK], dtype=tl.float32)
    q = tl.zeros([ROWS, RANK], dtype=tl.float32)
    squares = tl.zeros([ROWS], dtype=tl.float64)
    energy = tl.zeros([ROWS], dtype=tl.float64)
    for chunk in range(0, in_features, FRESH_COLUMNS):
        part_u = tl.zeros([ROWS, RANK], dtype=tl.float32)
        part_q = tl.zeros([ROWS, RANK], dtype=tl.float32)
        for first in range(chunk, min(chunk + FRESH_COLUMNS, in_features), COLUMNS):
            d = first + tl.arange(0, COLUMNS)
            x_tile = matrix(x, n, d, x_row, x_column, rows, in_features, TF32)
            weight = matrix(encoder, d, k, encoder_column, encoder_row, in_features, rank, TF32)
            part_u = dot(x_tile, weight, part_u, PRECISION)
            if JOINT:
                if not TIED:
                    weight = matrix(decoder, d, k, decoder_row, decoder_column, in_features, rank, TF32)
                    part_q = dot(x_tile, weight, part_q, PRECISION)
                squares += centred_squares(x_tile, decoder_bias, n, d, rows, in_features, HAS_DECODER_BIAS)
                if DIRECT_BELOW > 0:
                    energy += sum_of_squares(x_tile)
        u += part_u
        q += part_q
    if not JOINT:
        for chunk in range(0, out_features, FRESH_COLUMNS):
            part_q = tl.zeros([ROWS, RANK], dtype=tl.float32)
            for first in range(chunk, min(chunk + FRESH_COLUMNS, out_features), COLUMNS):
                d = first + tl.arange(0, COLUMNS)
                t_tile = matrix(target, n, d, target_row, target_column, rows, out_features, TF32)
                weight = matrix(decoder, d, k, decoder_row, decoder_column, out_features, rank, TF32)
                part_q = dot(t_tile, weight, part_q, PRECISION)
                squares += centred_squares(t_tile, decoder_bias, n, d, rows, out_features, HAS_DECODER_BIAS)
                if DIRECT_BELOW > 0:
                    energy += sum_of_squares(t_tile)
            q += part_q
    if JOINT and TIED:
        q = u
    q -= vector(offset, k, rank, True)[None, :]
    u += vector(encoder_bias, k, rank, HAS_ENCODER_BIAS)[None, :]
    # Rows past the end are zero, and would else count as rows that hold the biases.
    z = tl.where((n < rows)[:, None], activate(u, ACTIVATION), 0.0)
    # In this order: the sum over Z ⊙ Q taken by itself, before the product, makes the compiler spill.
    e = times_gram(z, gram, k, rank, -q)
    loss = tl.sum(squares) + tl.sum(tl.sum(z * (e - q), axis=1).to(tl.float64))
    if DIRECT_BELOW > 0:
        direct = loss < DIRECT_BELOW * tl.sum(energy)
        if direct:
            loss = loss * 0
            e = tl.zeros([ROWS, RANK], dtype=tl.float32)
            for first in range(0, out_features, COLUMNS):
                d = first + tl.arange(0, COLUMNS)
                t_tile = matrix(target, n, d, target_row, target_column, rows, out_features, TF32)
                weight = matrix(decoder, d, k, decoder_row, decoder_column, out_features, rank, TF32)
                bias = vector(decoder_bias, d, out_features, HAS_DECODER_BIAS)
                residual = dot(z, tl.trans(weight), bias[None, :] - t_tile, "ieee")
                residual = tl.where((n < rows)[:, None], residual, 0.0)
                loss += tl.sum(tl.sum(residual * residual, axis=1).to(tl.float64))
                e = dot(residual, weight, e, "ieee")
        tl.store(direct_tiles + tile, direct.to(tl.int32))
    tl.store(losses + tile, loss)
    if STORE or STORE_WIDE:
        du = tl.where((n < rows)[:, None], e * slope_of(u, ACTIVATION), 0.0)
        # Not of what is rounded below: these are sums that it would bias.
        tl.store(slope_sums + tile * rank + k, tl.sum(du, axis=0), mask=k < rank)
        if STORE:
            put(code, narrow(z, code.dtype.element_ty, TF32), n, k, rank, 1, rows, rank)
            put(slope, narrow(du, slope.dtype.element_ty, TF32), n, k, rank, 1, rows, rank)
        if STORE_WIDE:
            put(wide_code, z, n, k, rank, 1, rows, rank)
            put(wide_slope, du, n, k, rank, 1, rows, rank)


@triton.jit
def times_gram(z, gram, k, rank, acc):
    """``acc + z G``, with no digit of float32 lost.

    With G in bfloat16 parts, so is Z: six products on the matrix unit leave out 2⁻²⁴ of Z G. In loops, which the
    compiler neither unrolls nor overlaps: registers and shared memory hold one part of each at a time.
    """
    if gram.dtype.element_ty == tl.float32:
        return dot(z, matrix(gram, k, k, rank, 1, rank, rank, False), acc, "ieee")
    else:
        rest = z
        for part in tl.range(0, GRAM_PARTS, num_stages=1):
            high = narrow(rest, tl.bfloat16, False)
            for other in tl.range(0, GRAM_PARTS - part, num_stages=1):
                g = matrix(gram + other * rank * rank, k, k, rank, 1, rank, rank, False)
                acc = dot(high, g, acc, "ieee")
            rest -= high.to(tl.float32)
        return acc


@triton.jit
def centred_squares(tile, bias, n, d, rows, features, HAS_BIAS: tl.constexpr):
    """Σ (t − bd)² of each row."""
    a = tile.to(tl.float32)
    if HAS_BIAS:
        a = tl.where((n < rows)[:, None], a - vector(bias, d, features, True)[None, :], 0.0)
    return sum_of_squares(a)


@triton.jit
def sum_of_squares(tile):
    """Of each row, for a sum that is float64: the loss is a small difference of such sums."""
    a = tile.to(tl.float32)
    return tl.sum(a * a, axis=1).to(tl.float64)
