"""Σ (x − t)² and its gradients c (x − t) and −c (x − t): bound by memory, so read once and in order."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import narrow


@triton.jit
def place(i, columns, row, ONE_ROW: tl.constexpr):
    """The offset of element i of a matrix with contiguous rows."""
    if ONE_ROW:
        return i
    else:
        return (i // columns) * row + i % columns


@triton.jit
def forward(
    x, target, parts, count, columns, x_row, target_row,
    ONE_ROW: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The partial sum of BLOCKS·BLOCK elements a program."""
    lanes = tl.zeros([BLOCK], dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    for block in tl.static_range(BLOCKS):
        i = start + block * BLOCK + tl.arange(0, BLOCK)
        a = tl.load(x + place(i, columns, x_row, ONE_ROW), mask=i < count, other=0.0).to(tl.float32)
        b = tl.load(target + place(i, columns, target_row, ONE_ROW), mask=i < count, other=0.0).to(tl.float32)
        lanes += (a - b) * (a - b)
    tl.store(parts + tl.program_id(0), tl.sum(lanes.to(tl.float64)))


@triton.jit
def backward(
    x, target, scale, d_input, d_target, count, columns, x_row, target_row, d_input_row, d_target_row,
    INPUT: tl.constexpr, TARGET: tl.constexpr, ONE_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients that are wanted, BLOCK elements a program. The scale comes from the device."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    a = tl.load(x + place(i, columns, x_row, ONE_ROW), mask=inside, other=0.0).to(tl.float32)
    b = tl.load(target + place(i, columns, target_row, ONE_ROW), mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(scale).to(tl.float32) * (a - b)
    if INPUT:
        value = narrow(gradient, d_input.dtype.element_ty, False)
        tl.store(d_input + place(i, columns, d_input_row, ONE_ROW), value, mask=inside)
    if TARGET:
        value = narrow(-gradient, d_target.dtype.element_ty, False)
        tl.store(d_target + place(i, columns, d_target_row, ONE_ROW), value, mask=inside)
