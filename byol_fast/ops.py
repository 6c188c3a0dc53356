"""The operations as ``torch.library`` ops over a backend's kernels: what ``torch.compile`` and ``torch.export`` see.

Every op carries the name of its backend, so a compiled graph keeps the choice made when it was traced. The ops have no
derivatives of their own (:mod:`byol_fast.autograd` adds them) and work on matrices: input ``[N, D]``, target
``[N, Dₒ]``, weights in ``nn.Linear`` layout, ``decoder_weight=None`` for tied weights. :mod:`byol_fast.backends.base`
says what each kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import accumulation_dtype, kernels

_library = torch.library.Library("byol_fast", "DEF")


def _define(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """One op: its schema, its kernel on every device, its shapes for tracing, and a loop for ``torch.vmap``."""
    _library.define(name + torch.library.infer_schema(kernel, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"byol_fast::{name}", fake, lib=_library)
    torch.library.register_vmap(f"byol_fast::{name}", _loop_over(name), lib=_library)


def _loop_over(name: str) -> Callable[..., Any]:
    """The batching rule of every op: one call a sample."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        op = getattr(torch.ops.byol_fast, name)
        samples = [
            op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return [torch.stack(column) for column in zip(*samples, strict=True)], [0] * len(samples[0])

    return rule


def _shortcut(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The op, or its kernel where nobody watches: the dispatcher costs more than a small product."""
    op = getattr(torch.ops.byol_fast, name).default

    def run(*args: Any) -> Any:
        watched = (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._are_functorch_transforms_active()
            or type(args[0]) not in (Tensor, torch.nn.Parameter)
        )
        return op(*args) if watched else kernel(*args)

    return run


def _wanted(results: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """The results asked for; an op cannot return None, so an empty tensor stands for the others."""
    return [
        result if need and result is not None else like.new_empty(0)
        for result, need in zip(results, needs, strict=True)
    ]


def _sum_like(input: Tensor) -> Tensor:
    return input.new_empty((), dtype=accumulation_dtype(input.dtype))


def _empty(input: Tensor, *shape: int) -> Tensor:
    return input.new_empty(shape, dtype=accumulation_dtype(input.dtype))


def _squared_error(input: Tensor, target: Tensor, backend: str) -> Tensor:
    return kernels(backend).squared_error(input, target)


def _squared_error_fake(input: Tensor, target: Tensor, backend: str) -> Tensor:
    return _sum_like(input)


def _squared_error_backward(
    input: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool], backend: str
) -> list[Tensor]:
    return _wanted(kernels(backend).squared_error_backward(input, target, scale, needs), needs, input)


def _squared_error_backward_fake(
    input: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool], backend: str
) -> list[Tensor]:
    return _wanted([torch.empty_like(input), torch.empty_like(target)], needs, input)


def _bottleneck(
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    encoder_bias: Tensor | None,
    decoder_bias: Tensor | None,
    activation: str,
    residual: bool,
    save_code: bool,
    backend: str,
) -> list[Tensor]:
    results = kernels(backend).bottleneck(
        input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, activation, residual, save_code
    )
    return _wanted(results, (True, save_code), input)


def _bottleneck_fake(
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    encoder_bias: Tensor | None,
    decoder_bias: Tensor | None,
    activation: str,
    residual: bool,
    save_code: bool,
    backend: str,
) -> list[Tensor]:
    rows, rank = input.shape[0], encoder_weight.shape[0]
    out_features = encoder_weight.shape[1] if decoder_weight is None else decoder_weight.shape[0]
    results = [input.new_empty(rows, out_features), _empty(input, rows, rank)]
    return _wanted(results, (True, save_code), input)


def _bottleneck_backward(
    grad: Tensor,
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    code: Tensor,
    activation: str,
    residual: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    results = kernels(backend).bottleneck_backward(
        grad, input, encoder_weight, decoder_weight, code, activation, residual, needs
    )
    return _wanted(results, needs, input)


def _bottleneck_backward_fake(
    grad: Tensor,
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    code: Tensor,
    activation: str,
    residual: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    (rank, in_features), out_features = encoder_weight.shape, grad.shape[1]
    results = [
        input.new_empty(input.shape),
        _empty(input, rank, in_features),
        _empty(input, out_features, rank),
        _empty(input, rank),
        _empty(input, out_features),
    ]
    return _wanted(results, needs, input)


def _step(
    input: Tensor,
    target: Tensor | None,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    encoder_bias: Tensor | None,
    decoder_bias: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    save_codes: bool,
    backend: str,
) -> list[Tensor]:
    results = kernels(backend).step(
        input, target, encoder_weight, decoder_weight, encoder_bias, decoder_bias, activation, needs, save_codes
    )
    return _wanted(results, (True, *needs, save_codes, save_codes), input)


def _step_fake(
    input: Tensor,
    target: Tensor | None,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    encoder_bias: Tensor | None,
    decoder_bias: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    save_codes: bool,
    backend: str,
) -> list[Tensor]:
    rows, (rank, in_features) = input.shape[0], encoder_weight.shape
    out_features = in_features if decoder_weight is None else decoder_weight.shape[0]
    results = [
        _sum_like(input),
        _empty(input, rank, in_features),
        _empty(input, out_features, rank),
        _empty(input, rank),
        _empty(input, out_features),
        _empty(input, rows, rank),
        _empty(input, rows, rank),
    ]
    return _wanted(results, (True, *needs, save_codes, save_codes), input)


def _sparse_step(
    row_starts: Tensor,
    columns: Tensor,
    values: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    encoder_bias: Tensor | None,
    decoder_bias: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    results = kernels(backend).sparse_step(
        row_starts, columns, values, encoder_weight, decoder_weight, encoder_bias, decoder_bias, activation, needs
    )
    return _wanted(results, (True, *needs), values)


def _sparse_step_fake(
    row_starts: Tensor,
    columns: Tensor,
    values: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    encoder_bias: Tensor | None,
    decoder_bias: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    rank, in_features = encoder_weight.shape
    results = [
        _sum_like(values),
        _empty(values, rank, in_features),
        _empty(values, in_features, rank),
        _empty(values, rank),
        _empty(values, in_features),
    ]
    return _wanted(results, (True, *needs), values)


def _step_input_gradients(
    input: Tensor,
    target: Tensor | None,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    decoder_bias: Tensor | None,
    code: Tensor,
    code_gradient: Tensor,
    scale: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    results = kernels(backend).step_input_gradients(
        input, target, encoder_weight, decoder_weight, decoder_bias, code, code_gradient, scale, needs
    )
    return _wanted(results, needs, input)


def _step_input_gradients_fake(
    input: Tensor,
    target: Tensor | None,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    decoder_bias: Tensor | None,
    code: Tensor,
    code_gradient: Tensor,
    scale: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    results = [input.new_empty(input.shape), input.new_empty((input if target is None else target).shape)]
    return _wanted(results, needs, input)


_define("squared_error", _squared_error, _squared_error_fake)
_define("squared_error_backward", _squared_error_backward, _squared_error_backward_fake)
_define("bottleneck", _bottleneck, _bottleneck_fake)
_define("bottleneck_backward", _bottleneck_backward, _bottleneck_backward_fake)
_define("step", _step, _step_fake)
_define("sparse_step", _sparse_step, _sparse_step_fake)
_define("step_input_gradients", _step_input_gradients, _step_input_gradients_fake)

squared_error: Callable[..., Tensor] = _shortcut("squared_error", _squared_error)
squared_error_backward: Callable[..., list[Tensor]] = _shortcut("squared_error_backward", _squared_error_backward)
bottleneck: Callable[..., list[Tensor]] = _shortcut("bottleneck", _bottleneck)
bottleneck_backward: Callable[..., list[Tensor]] = _shortcut("bottleneck_backward", _bottleneck_backward)
step: Callable[..., list[Tensor]] = _shortcut("step", _step)
sparse_step: Callable[..., list[Tensor]] = _shortcut("sparse_step", _sparse_step)
step_input_gradients: Callable[..., list[Tensor]] = _shortcut("step_input_gradients", _step_input_gradients)
