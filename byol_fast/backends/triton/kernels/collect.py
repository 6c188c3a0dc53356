"""Pass 2 of the training step, and the end: sums over rows, in an order that is always the same.

    Tᵀ·Z,  Xᵀ·dU,  ZᵀZ,  Σ (t − bd),  Σ z

Each program makes a block of columns of one of these from a share of the rows; the shares are added up, in order, by
:func:`finish`. In row tiles that took the direct form, R takes the place of A, and Z counts as zero elsewhere:

    dWe = dUᵀ X,   dWd = Wd (ZᵀZ) − TᵀZ + bd (Σz)ᵀ + RᵀZ,   dbe = Σ dU,   dbd = Wd Σz − Σ a + Σ r
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, matrix, put, vector

# A float32 sum is begun afresh every so many rows.
FRESH_ROWS = tl.constexpr(4096)


@triton.jit
def collect(
    x, target, decoder, decoder_bias, code, slope, direct_tiles,
    target_code, input_slope, code_code, target_sums, code_sums,
    rows, in_features, out_features, rank, share, tile_rows,
    x_row, x_column, target_row, target_column, decoder_row, decoder_column,
    JOINT: tl.constexpr, HAS_DECODER_BIAS: tl.constexpr, DIRECT: tl.constexpr,
    TF32: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, CODE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (c, s): columns c, rows s·share … JOINT: one reading of X serves Z and dU."""
    column_tile = tl.program_id(0)
    split = tl.program_id(1)
    target_tiles = tl.cdiv(out_features, COLUMNS)
    input_tiles = 0 if JOINT else tl.cdiv(in_features, COLUMNS)
    k = tl.arange(0, RANK)
    begin = split.to(tl.int64) * share
    end = min(begin + share, rows)
    if column_tile < target_tiles:
        d = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        bias = vector(decoder_bias, d, out_features, HAS_DECODER_BIAS)
        for chunk in range(begin, end, FRESH_ROWS):
            with_code = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
            with_slope = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
            sums = tl.zeros([COLUMNS], dtype=tl.float32)
            for first in range(chunk, min(chunk + FRESH_ROWS, end), ROWS):
                n = first + tl.arange(0, ROWS)
                left = matrix(target, n, d, target_row, target_column, end, out_features, TF32)
                z = matrix(code, n, k, rank, 1, end, rank, False)
                if JOINT:
                    du = matrix(slope, n, k, rank, 1, end, rank, False)
                    with_slope = dot(tl.trans(left), du, with_slope, PRECISION)
                a = left.to(tl.float32)
                if HAS_DECODER_BIAS:
                    a = tl.where((n < end)[:, None], a - bias[None, :], 0.0)
                if DIRECT:
                    if tl.load(direct_tiles + first // tile_rows) != 0:
                        # A few codes at a time: the whole of Wd's block would not fit the registers.
                        for block in range(0, RANK, CODE_COLUMNS):
                            j = block + tl.arange(0, CODE_COLUMNS)
                            some = matrix(code, n, j, rank, 1, end, rank, False)
                            weight = matrix(decoder, d, j, decoder_row, decoder_column, out_features, rank, TF32)
                            a -= dot(some, tl.trans(weight), tl.zeros([ROWS, COLUMNS], dtype=tl.float32), "ieee")
                        left = a
                with_code = dot(tl.trans(left), z, with_code, PRECISION)
                sums += tl.sum(a, axis=0)
            more = chunk > begin
            add(target_code, with_code, split, d, k, out_features, rank, more)
            if JOINT:
                add(input_slope, with_slope, split, d, k, out_features, rank, more)
            add_vector(target_sums, sums, split, d, out_features, more)
    elif column_tile < target_tiles + input_tiles:
        d = (column_tile - target_tiles) * COLUMNS + tl.arange(0, COLUMNS)
        for chunk in range(begin, end, FRESH_ROWS):
            with_slope = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
            for first in range(chunk, min(chunk + FRESH_ROWS, end), ROWS):
                n = first + tl.arange(0, ROWS)
                left = matrix(x, n, d, x_row, x_column, end, in_features, TF32)
                du = matrix(slope, n, k, rank, 1, end, rank, False)
                with_slope = dot(tl.trans(left), du, with_slope, PRECISION)
            add(input_slope, with_slope, split, d, k, in_features, rank, chunk > begin)
    else:
        block = column_tile - target_tiles - input_tiles
        j = block * CODE_COLUMNS + tl.arange(0, CODE_COLUMNS)
        for chunk in range(begin, end, FRESH_ROWS):
            products = tl.zeros([CODE_COLUMNS, RANK], dtype=tl.float32)
            sums = tl.zeros([CODE_COLUMNS], dtype=tl.float32)
            for first in range(chunk, min(chunk + FRESH_ROWS, end), ROWS):
                n = first + tl.arange(0, ROWS)
                # Rows in the direct form, of which RᵀZ is all there is, lie past the end here.
                last = end
                if DIRECT:
                    if tl.load(direct_tiles + first // tile_rows) != 0:
                        last = begin
                left = matrix(code, n, j, rank, 1, last, rank, False)
                z = matrix(code, n, k, rank, 1, last, rank, False)
                products = dot(tl.trans(left), z, products, PRECISION)
                sums += tl.sum(left.to(tl.float32), axis=0)
            add(code_code, products, split, j, k, rank, rank, chunk > begin)
            add_vector(code_sums, sums, split, j, rank, chunk > begin)


@triton.jit
def add(pointer, value, split, d, k, features, rank, more):
    """The program's own partial sum: stored, or added to what it stored before."""
    part = pointer + split.to(tl.int64) * features * rank
    if more:
        value += matrix(part, d, k, rank, 1, features, rank, False)
    put(part, value, d, k, rank, 1, features, rank)


@triton.jit
def add_vector(pointer, value, split, d, features, more):
    part = pointer + split.to(tl.int64) * features + d
    if more:
        value += tl.load(part, mask=d < features, other=0.0)
    tl.store(part, value, mask=d < features)


@triton.jit
def finish(
    decoder, decoder_bias, losses,
    target_code, input_slope, code_code, target_sums, code_sums, slope_sums,
    total, d_encoder, d_decoder, d_encoder_bias, d_decoder_bias,
    in_features, out_features, rank, splits, tiles, decoder_row, decoder_column,
    TIED: tl.constexpr, GRAM: tl.constexpr, HAS_DECODER_BIAS: tl.constexpr, TF32: tl.constexpr, EXACT: tl.constexpr,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, CODE_COLUMNS: tl.constexpr, TILES: tl.constexpr,
    SUM_TILES: tl.constexpr,
):  # fmt: skip
    """Adds the shares up and makes the four gradients, a block of columns a program; GRAM: and the loss."""
    block = tl.program_id(0)
    d = block * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, RANK)
    from_code = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
    from_slope = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
    sums = tl.zeros([COLUMNS], dtype=tl.float32)
    for split in range(splits):
        out_shift = tl.cast(out_features, tl.int64) * split
        in_shift = tl.cast(in_features, tl.int64) * split
        from_code += matrix(target_code + out_shift * rank, d, k, rank, 1, out_features, rank, False)
        from_slope += matrix(input_slope + in_shift * rank, d, k, rank, 1, in_features, rank, False)
        sums += vector(target_sums + out_shift, d, out_features, True)
    if GRAM:
        codes = tl.zeros([RANK], dtype=tl.float32)
        for split in range(splits):
            codes += vector(code_sums + split * rank, k, rank, True)
        bias = vector(decoder_bias, d, out_features, HAS_DECODER_BIAS)
        from_code = bias[:, None] * codes[None, :] - from_code
        sums = -sums
        # A few codes at a time: the whole of ZᵀZ would not fit the registers.
        for first in range(0, RANK, CODE_COLUMNS):
            j = first + tl.arange(0, CODE_COLUMNS)
            products = tl.zeros([CODE_COLUMNS, RANK], dtype=tl.float32)
            some_codes = tl.zeros([CODE_COLUMNS], dtype=tl.float32)
            for split in range(splits):
                products += matrix(code_code + split * rank * rank, j, k, rank, 1, rank, rank, False)
                some_codes += vector(code_sums + split * rank, j, rank, True)
            weight = matrix(decoder, d, j, decoder_row, decoder_column, out_features, rank, TF32).to(tl.float32)
            from_code = dot(weight, products, from_code, EXACT)
            sums += tl.sum(weight * some_codes[None, :], axis=1)
    tl.store(d_decoder_bias + d, sums, mask=d < out_features)
    if TIED:
        from_slope += from_code
    else:
        put(d_decoder, from_code, d, k, rank, 1, out_features, rank)
    put(d_encoder, from_slope, d, k, 1, in_features, in_features, rank)
    if block == 0:
        slopes = tl.zeros([RANK], dtype=tl.float32)
        for first in range(0, tiles, SUM_TILES):
            part = matrix(slope_sums, first + tl.arange(0, SUM_TILES), k, rank, 1, tiles, rank, False)
            slopes += tl.sum(part, axis=0)
        tl.store(d_encoder_bias + k, slopes, mask=k < rank)
        if GRAM:
            tl.store(total, sum_of(losses, tiles, TILES))


@triton.jit
def add_up(parts, total, count, BLOCK: tl.constexpr):
    """The sum of partial sums, in order, by one program."""
    tl.store(total, sum_of(parts, count, BLOCK))


@triton.jit
def sum_of(parts, count, BLOCK: tl.constexpr):
    lanes = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        lanes += tl.load(parts + i, mask=i < count, other=0.0).to(tl.float64)
    value = tl.sum(lanes)
    # Rounding may leave a sum of squares just below zero; the gradients do not pass through it. NaN stays NaN.
    return tl.where(value < 0, 0.0, value).to(tl.float32)
