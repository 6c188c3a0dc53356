"""What every kernel computes with: matrix products, roundings, activations and their derivatives.

The interpreter (``TRITON_INTERPRET=1``) multiplies the bits of bfloat16 as integers, and truncates when it narrows to
it; both are put right here, so that it computes what the device computes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``, summed in float32; PRECISION says how float32 operands are multiplied."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee", out_dtype=tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def round_operand(x, TF32: tl.constexpr):
    """The operand as the matrix unit will see it. tf32 is rounded to nearest here, for the unit itself truncates."""
    if TF32:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
        # Neither NaN nor what would become infinite is rounded.
        x = tl.where(tl.abs(x) < 3.0e38, rounded, x)
    return x


@triton.jit
def narrow(x, dtype: tl.constexpr, TF32: tl.constexpr):
    """float32 rounded to nearest: to ``dtype``, or to what a tf32 product takes."""
    if dtype == tl.float32:
        return round_operand(x, TF32)
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 3.0e38, rounded, x)
    return x.to(dtype)


@triton.jit
def tanh(u):
    """A polynomial near 0, where the quotient of exponentials would cancel."""
    s = u * u
    p = -5.70498872745e-3
    p = p * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    small = u + u * s * p
    decay = tl.exp(-2.0 * tl.abs(u))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(u) < 0.625, small, tl.where(u < 0, -large, large))


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """f(u)."""
    if ACTIVATION == "relu":
        # Written so that NaN stays NaN.
        return tl.where(u < 0, 0.0, u)
    elif ACTIVATION == "gelu":
        return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * u * (1.0 + tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)))
    elif ACTIVATION == "silu":
        return u / (1.0 + tl.exp(-u))
    elif ACTIVATION == "tanh":
        return tanh(u)
    else:
        return u


@triton.jit
def slope_of(u, ACTIVATION: tl.constexpr):
    """f′(u)."""
    if ACTIVATION == "relu":
        return tl.where(u > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (u + 0.044715 * u * u * u))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * u * u)
        return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * inner
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-u))
        return s * (1.0 + u * (1.0 - s))
    elif ACTIVATION == "tanh":
        t = tanh(u)
        return 1.0 - t * t
    else:
        return u * 0.0 + 1.0


@triton.jit
def vector(pointer, index, count, PRESENT: tl.constexpr):
    """A bias as float32, zero where there is none."""
    if PRESENT:
        return tl.load(pointer + index, mask=index < count, other=0.0).to(tl.float32)
    else:
        return index.to(tl.float32) * 0.0


@triton.jit
def matrix(pointer, rows, columns, row_stride, column_stride, row_count, column_count, TF32: tl.constexpr):
    """A tile as the matrix unit will see it, zero outside the matrix. Offsets are int64, for tensors may be large."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return round_operand(tl.load(pointer + offsets, mask=inside, other=0.0), TF32)


@triton.jit
def put(pointer, value, rows, columns, row_stride, column_stride, row_count, column_count):
    """Stores a tile, but for what lies outside the matrix."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    tl.store(pointer + offsets, value, mask=inside)
