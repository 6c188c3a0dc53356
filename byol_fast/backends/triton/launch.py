"""From tensors to launches: what :class:`byol_fast.backends.triton.Triton` calls. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import OutOfResources

from ..base import tf32_allowed
from ..layout import collapse
from .config import Launch, config, padded_rank
from .kernels import collect, encode, layer, squared_error

# The residual ratio below which a row tile takes the direct form.
DIRECT_BELOW = 4e-3
# Rows and columns of G that one program makes.
_GRAM_TILE = 16
_ELEMENTS, _BLOCKS = 4096, 8
# Columns of the gradients that one program of the last launch makes, and partial losses it adds at a time.
_FINISH_COLUMNS, _TILES = 32, 1024
# The second stage of a sum takes so many parts at most.
_MAX_SPLITS = 64


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _precision(x: Tensor) -> dict[str, Any]:
    """How float32 is multiplied: in tf32 only where PyTorch's own settings allow it, and never where digits cancel.

    There, float32 takes plain float32 arithmetic. Half precision and tf32 keep a code of float32; three bfloat16 parts
    of each of its numbers, and six products, keep the matrix unit busy.
    """
    coarse = _is_coarse(x)
    tf32 = coarse and x.dtype == torch.float32
    return {"TF32": tf32, "PRECISION": "tf32" if tf32 else "ieee", "EXACT": "bf16x6" if coarse else "ieee"}


def _is_coarse(x: Tensor) -> bool:
    """Whether wide products round their operands: then the Gram form is better than eager at every residual ratio."""
    return x.dtype != torch.float32 or tf32_allowed()


def _product(x: Tensor) -> dict[str, Any]:
    """For kernels in which nothing cancels."""
    precision = _precision(x)
    return {"TF32": precision["TF32"], "PRECISION": precision["PRECISION"]}


def _run(kernel: Any, grid: tuple[int, ...], launch: Launch, *arguments: Any, **options: Any) -> None:
    # Stated, because its default differs between versions and results depend on it.
    try:
        kernel[grid](*arguments, **options, num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True)
    except OutOfResources as error:
        raise RuntimeError(
            f"backend 'triton': kernel {kernel.__name__} needs {error.required} of {error.name}, and this GPU has "
            f"{error.limit}; byol_fast.use_backend('gram') runs on any"
        ) from error


def _config(x: Tensor, rank: int) -> Any:
    return config(rank, x.dtype != torch.float32)


def _blocks(launch: Launch, rank: int) -> dict[str, int]:
    return {"ROWS": launch.rows, "COLUMNS": launch.columns, "RANK": padded_rank(rank)}


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _decoder(encoder: Tensor, decoder: Tensor | None) -> Tensor:
    return encoder.t() if decoder is None else decoder


def step(
    x: Tensor,
    target: Tensor | None,
    encoder: Tensor,
    decoder: Tensor | None,
    encoder_bias: Tensor | None,
    decoder_bias: Tensor | None,
    activation: str,
    gradients: bool,
    save_codes: bool,
) -> list[Tensor | None]:
    """Σ R², the four gradients of ½ Σ R² (dWd None when tied), Z and dU; None for what was not asked for."""
    tied, goal, weight = decoder is None, x if target is None else target, _decoder(encoder, decoder)
    rows, rank = x.shape[0], encoder.shape[0]
    launches, precision = _config(x, rank), _precision(x)
    flags: dict[str, Any] = {"HAS_DECODER_BIAS": decoder_bias is not None, "TF32": precision["TF32"]}
    coarse, parts = _is_coarse(x), encode.GRAM_PARTS.value
    direct_below = 0.0 if coarse else DIRECT_BELOW
    gram = x.new_empty(parts, rank, rank, dtype=torch.bfloat16) if coarse else _floats(x, rank, rank)
    offset = _floats(x, rank)
    _run(
        encode.prepare, (_ceil(rank, _GRAM_TILE),) * 2, Launch(0, 0, 4, 2),
        weight, _or(decoder_bias, x), gram, offset, *weight.shape, *weight.stride(), **flags,
        TILE=_GRAM_TILE, BLOCK=64,
    )  # fmt: skip

    # Codes are stored as products take them; where that rounds them, whoever asked for them gets others.
    store, store_wide = gradients or (save_codes and not coarse), save_codes and coarse
    code, slope = (x.new_empty(rows, rank) if store else x for _ in range(2))
    wide_code, wide_slope = (_floats(x, rows, rank) if store_wide else x for _ in range(2))
    tiles = _ceil(rows, launches.encode.rows)
    slope_sums = _floats(x, tiles, rank)
    losses = x.new_empty(tiles, dtype=torch.float64)
    direct_tiles = x.new_empty(tiles if direct_below else 0, dtype=torch.int32)
    _run(
        encode.encode, (tiles,), launches.encode,
        x, goal, encoder, weight, _or(encoder_bias, x), _or(decoder_bias, x), gram, offset,
        code, slope, wide_code, wide_slope, slope_sums, losses, direct_tiles,
        *x.shape, goal.shape[1], rank, *x.stride(), *goal.stride(), *encoder.stride(), *weight.stride(),
        **flags, ACTIVATION=activation, JOINT=target is None, TIED=tied, HAS_ENCODER_BIAS=encoder_bias is not None,
        STORE=store, STORE_WIDE=store_wide, DIRECT_BELOW=direct_below, PRECISION=precision["PRECISION"],
        **_blocks(launches.encode, rank),
    )  # fmt: skip
    total = _floats(x)
    codes = ([wide_code, wide_slope] if coarse else [code, slope]) if save_codes else [None, None]
    if not gradients:
        _run(collect.add_up, (1,), Launch(0, 0, 4, 1), losses, total, tiles, BLOCK=_TILES)
        return [total, None, None, None, None, *codes]
    results = _gradients(
        x,
        goal,
        encoder,
        decoder,
        decoder_bias,
        code,
        slope,
        slope_sums,
        losses,
        direct_tiles,
        total,
        target is None,
        True,
    )
    return [total, *results, *codes]


def _gradients(
    x: Tensor,
    target: Tensor,
    encoder: Tensor,
    decoder: Tensor | None,
    decoder_bias: Tensor | None,
    code: Tensor,
    slope: Tensor,
    slope_sums: Tensor,
    losses: Tensor,
    direct_tiles: Tensor,
    total: Tensor,
    joint: bool,
    gram: bool,
) -> list[Tensor | None]:
    """The gradients of (encoder_weight, decoder_weight, encoder_bias, decoder_bias), and the loss into ``total``."""
    (rows, in_features), out_features, rank = x.shape, target.shape[1], encoder.shape[0]
    weight, precision = _decoder(encoder, decoder), _precision(x)
    launches = _config(x, rank)
    launch = launches.collect
    flags: dict[str, Any] = {"HAS_DECODER_BIAS": decoder_bias is not None, "TF32": precision["TF32"]}
    code_columns = min(32, padded_rank(rank))
    column_tiles = _ceil(out_features, launch.columns) + (0 if joint else _ceil(in_features, launch.columns))
    column_tiles += _ceil(rank, code_columns) if gram else 0
    splits, share = _splits(x, rows, column_tiles, launch.rows)
    target_code, input_slope = _floats(x, splits, out_features, rank), _floats(x, splits, in_features, rank)
    code_code, target_sums = _floats(x, splits, rank, rank), _floats(x, splits, out_features)
    sums = (target_code, input_slope, code_code, target_sums, _floats(x, splits, rank))
    _run(
        collect.collect, (column_tiles, splits), launch,
        x, target, weight, _or(decoder_bias, x), code, slope, direct_tiles, *sums,
        rows, in_features, out_features, rank, share, launches.encode.rows,
        *x.stride(), *target.stride(), *weight.stride(),
        **flags, JOINT=joint, DIRECT=direct_tiles.numel() > 0, PRECISION=precision["PRECISION"],
        **_blocks(launch, rank), CODE_COLUMNS=code_columns,
    )  # fmt: skip
    d_encoder, d_encoder_bias = _floats(x, rank, in_features), _floats(x, rank)
    d_decoder = None if decoder is None else _floats(x, out_features, rank)
    d_decoder_bias = _floats(x, out_features)
    _run(
        collect.finish, (_ceil(max(in_features, out_features), _FINISH_COLUMNS),), Launch(0, 0, 8, 1),
        weight, _or(decoder_bias, x), losses, *sums, slope_sums,
        total, d_encoder, _or(d_decoder, x), d_encoder_bias, d_decoder_bias,
        in_features, out_features, rank, splits, slope_sums.shape[0], *weight.stride(),
        **flags, EXACT=precision["EXACT"], GRAM=gram, TIED=decoder is None, COLUMNS=_FINISH_COLUMNS,
        RANK=padded_rank(rank), CODE_COLUMNS=code_columns, TILES=_TILES, SUM_TILES=64,
    )  # fmt: skip
    return [d_encoder, d_decoder, d_encoder_bias, d_decoder_bias]


def _splits(x: Tensor, rows: int, column_tiles: int, tile_rows: int) -> tuple[int, int]:
    """Into how many shares the rows are split, about two programs for each multiprocessor, and rows a share."""
    wanted = min(_MAX_SPLITS, max(1, 2 * _processors(x) // column_tiles))
    share = _ceil(_ceil(rows, wanted), tile_rows) * tile_rows
    return _ceil(rows, share), share


def _processors(x: Tensor) -> int:
    """Multiprocessors of the device; in the interpreter, so many that sums have several parts."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def forward(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor | None,
    encoder_bias: Tensor | None,
    decoder_bias: Tensor | None,
    activation: str,
    residual: bool,
    save_code: bool,
) -> list[Tensor | None]:
    """The output, and U."""
    weight, rank, launch = _decoder(encoder, decoder), encoder.shape[0], _config(x, encoder.shape[0]).forward
    rows, out_features = x.shape[0], weight.shape[0]
    output = x.new_empty(rows, out_features)
    code = _floats(x, rows, rank) if save_code else None
    _run(
        layer.forward, (_ceil(rows, launch.rows),), launch,
        x, encoder, weight, _or(encoder_bias, x), _or(decoder_bias, x), output, _or(code, x),
        *x.shape, out_features, rank, *x.stride(), *encoder.stride(), *weight.stride(),
        ACTIVATION=activation, RESIDUAL=residual, HAS_ENCODER_BIAS=encoder_bias is not None,
        HAS_DECODER_BIAS=decoder_bias is not None, STORE_WIDE=save_code, **_product(x), **_blocks(launch, rank),
    )  # fmt: skip
    return [output, code]


def backward(
    grad: Tensor,
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor | None,
    wide_code: Tensor,
    activation: str,
    residual: bool,
    input_gradient: bool,
    gradients: bool,
) -> list[Tensor | None]:
    """The gradients of (input, encoder_weight, decoder_weight, encoder_bias, decoder_bias); dWd None when tied."""
    weight, rank, launch = _decoder(encoder, decoder), encoder.shape[0], _config(x, encoder.shape[0]).backward
    rows, in_features = x.shape
    d_input = x.new_empty(rows, in_features) if input_gradient else None
    code, slope = (x.new_empty(rows if gradients else 0, rank) for _ in range(2))
    slope_sums = _floats(x, _ceil(rows, launch.rows), rank)
    _run(
        layer.backward, (_ceil(rows, launch.rows),), launch,
        grad, encoder, weight, wide_code.contiguous(), code, slope, slope_sums, _or(d_input, x),
        rows, in_features, grad.shape[1], rank, *grad.stride(), *encoder.stride(), *weight.stride(),
        ACTIVATION=activation, RESIDUAL=residual, STORE=gradients, INPUT=input_gradient, **_product(x),
        **_blocks(launch, rank),
    )  # fmt: skip
    if not gradients:
        return [d_input, None, None, None, None]
    none = x.new_empty(0, dtype=torch.int32)
    total = _floats(x)
    return [
        d_input,
        *_gradients(x, grad, encoder, decoder, None, code, slope, slope_sums, none, none, total, False, False),
    ]


def data_gradients(
    x: Tensor,
    target: Tensor | None,
    encoder: Tensor,
    decoder: Tensor | None,
    decoder_bias: Tensor | None,
    code: Tensor,
    slope: Tensor,
    scale: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """``scale·(dU We − [target is None] R)`` and ``−scale·R``."""
    weight, rank, launch = _decoder(encoder, decoder), encoder.shape[0], _config(x, encoder.shape[0]).data
    goal = x if target is None else target
    outputs = [tensor.new_empty(tensor.shape) if need else None for tensor, need in zip((x, goal), needs, strict=True)]
    columns = max(x.shape[1] if needs[0] else 0, goal.shape[1] if needs[1] else 0)
    _run(
        layer.data_gradients, (_ceil(x.shape[0], launch.rows), _ceil(columns, launch.columns)), launch,
        goal, encoder, weight, _or(decoder_bias, x), code.contiguous(), slope.contiguous(), scale,
        *(_or(output, x) for output in outputs),
        *x.shape, goal.shape[1], rank, *goal.stride(), *encoder.stride(), *weight.stride(),
        JOINT=target is None, INPUT=needs[0], TARGET=needs[1], HAS_DECODER_BIAS=decoder_bias is not None,
        **_product(x), **_blocks(launch, rank),
    )  # fmt: skip
    return outputs


def squared_error_sum(x: Tensor, target: Tensor) -> Tensor:
    """Σ (x − t)²."""
    rows, columns, (a, b) = collapse(x, target)
    programs = _ceil(rows * columns, _ELEMENTS * _BLOCKS)
    parts, total = x.new_empty(programs, dtype=torch.float64), _floats(x)
    launch = Launch(0, 0, 8, 1)
    _run(
        squared_error.forward, (programs,), launch, a, b, parts, rows * columns, columns, a.stride(0), b.stride(0),
        ONE_ROW=rows == 1, BLOCK=_ELEMENTS, BLOCKS=_BLOCKS,
    )  # fmt: skip
    _run(collect.add_up, (1,), launch, parts, total, programs, BLOCK=_TILES)
    return total


def squared_error_gradients(x: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """``scale·(x − t)`` and its negative."""
    outputs = [torch.empty_like(tensor) if need else None for tensor, need in zip((x, target), needs, strict=True)]
    present = [output for output in outputs if output is not None]
    rows, columns, (a, b, *matrices) = collapse(x, target, *present)
    remaining = iter(matrices)
    d_input, d_target = (a if output is None else next(remaining) for output in outputs)
    _run(
        squared_error.backward, (_ceil(rows * columns, _ELEMENTS),), Launch(0, 0, 8, 1),
        a, b, scale, d_input, d_target, rows * columns, columns,
        *(matrix.stride(0) for matrix in (a, b, d_input, d_target)),
        INPUT=needs[0], TARGET=needs[1], ONE_ROW=rows == 1, BLOCK=_ELEMENTS,
    )  # fmt: skip
    # An output that could not be viewed as a matrix was copied: its values go back.
    for output, matrix in zip(present, matrices, strict=True):
        if output.data_ptr() != matrix.data_ptr():
            output.copy_(matrix.reshape(output.shape))
    return outputs


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer is wanted even where a flag says that nothing is read or written."""
    return stand_in if tensor is None else tensor
