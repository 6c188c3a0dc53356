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

from .backends import Weights, accumulation_dtype, kernels, wanted

_library = torch.library.Library("byol_fast", "DEF")


_WEIGHTS = "Tensor encoder_weight, Tensor? decoder_weight, Tensor? encoder_bias, Tensor? decoder_bias"


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """One op: its schema, its kernel on every device, its shapes for tracing, and a loop for ``torch.vmap``."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _without_none(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"byol_fast::{name}", _without_none(fake), lib=_library)
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


def _without_none(function: Callable[..., Any]) -> Callable[..., Any]:
    """An op cannot return None: an empty tensor stands for what was not asked for."""

    def run(*args: Any) -> Any:
        results = function(*args)
        if isinstance(results, Tensor):
            return results
        return [args[0].new_empty(0) if result is None else result for result in results]

    return run


def _shortcut(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The op, or its kernel where nobody watches: the dispatcher costs more than a small product.

    What was not asked for is an empty tensor or None.
    """
    op = getattr(torch.ops.byol_fast, name).default

    def run(*args: Any) -> Any:
        return op(*args) if is_watched(args[0]) else kernel(*args)

    return run


def is_watched(tensor: Tensor) -> bool:
    """Whether a compiler, a mode, a transform or a subclass has to see the operations on this tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
    )


def _sum_like(input: Tensor) -> Tensor:
    return input.new_empty((), dtype=accumulation_dtype(input.dtype))


def _empty(input: Tensor, *shape: int) -> Tensor:
    return input.new_empty(shape, dtype=accumulation_dtype(input.dtype))


def _split(arguments: Sequence[Any]) -> tuple[Weights, Sequence[Any]]:
    """The weights, which come first, and what follows them."""
    return Weights(*arguments[:4]), arguments[4:]


def _weight_gradients(like: Tensor, weights: Weights) -> list[Tensor]:
    return [
        _empty(like, weights.rank, weights.in_features),
        _empty(like, weights.out_features, weights.rank),
        _empty(like, weights.rank),
        _empty(like, weights.out_features),
    ]


def _scale(reduction: str, count: int) -> float:
    """What a sum over so many elements is multiplied with."""
    return 1 / count if reduction == "mean" else 1.0


def _squared_error(input: Tensor, target: Tensor, backend: str) -> Tensor:
    return kernels(backend).squared_error(input, target)


def _squared_error_fake(input: Tensor, *_: Any) -> Tensor:
    return _sum_like(input)


def _squared_error_backward(
    input: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool], backend: str
) -> list[Tensor | None]:
    return wanted(kernels(backend).squared_error_backward(input, target, scale, needs), needs)


def _squared_error_backward_fake(
    input: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool], *_: Any
) -> list[Tensor | None]:
    return wanted([torch.empty_like(input), torch.empty_like(target)], needs)


def _bottleneck(input: Tensor, *rest: Any) -> list[Tensor | None]:
    weights, (activation, residual, save_code, backend) = _split(rest)
    return wanted(kernels(backend).bottleneck(input, weights, activation, residual, save_code), (True, save_code))


def _bottleneck_fake(input: Tensor, *rest: Any) -> list[Tensor | None]:
    weights, (_, _, save_code, _) = _split(rest)
    rows = input.shape[0]
    results = [input.new_empty(rows, weights.out_features), _empty(input, rows, weights.rank)]
    return wanted(results, (True, save_code))


def _bottleneck_backward(grad: Tensor, input: Tensor, *rest: Any) -> list[Tensor | None]:
    weights, (code, activation, residual, needs, backend) = _split(rest)
    results = kernels(backend).bottleneck_backward(grad, input, weights, code, activation, residual, needs)
    return wanted(results, needs)


def _bottleneck_backward_fake(grad: Tensor, input: Tensor, *rest: Any) -> list[Tensor | None]:
    weights, (*_, needs, _) = _split(rest)
    return wanted([input.new_empty(input.shape), *_weight_gradients(input, weights)], needs)


def _step(input: Tensor, target: Tensor | None, *rest: Any) -> list[Tensor | None]:
    weights, (activation, reduction, needs, save_codes, backend) = _split(rest)
    scale = _scale(reduction, input.shape[0] * weights.out_features)
    results = kernels(backend).step(input, target, weights, activation, needs, save_codes, scale)
    return wanted(results, (True, *needs, save_codes, save_codes))


def _step_fake(input: Tensor, target: Tensor | None, *rest: Any) -> list[Tensor | None]:
    weights, (_, _, needs, save_codes, _) = _split(rest)
    codes = [_empty(input, input.shape[0], weights.rank) for _ in range(2)]
    results = [_sum_like(input), *_weight_gradients(input, weights), *codes]
    return wanted(results, (True, *needs, save_codes, save_codes))


def _sparse_step(row_starts: Tensor, columns: Tensor, values: Tensor, *rest: Any) -> list[Tensor | None]:
    weights, (activation, reduction, needs, backend) = _split(rest)
    scale = _scale(reduction, (row_starts.numel() - 1) * weights.out_features)
    results = kernels(backend).sparse_step((row_starts, columns, values), weights, activation, needs, scale)
    return wanted(results, (True, *needs))


def _sparse_step_fake(row_starts: Tensor, columns: Tensor, values: Tensor, *rest: Any) -> list[Tensor | None]:
    weights, (_, _, needs, _) = _split(rest)
    return wanted([_sum_like(values), *_weight_gradients(values, weights)], (True, *needs))


def _step_input_gradients(input: Tensor, target: Tensor | None, *rest: Any) -> list[Tensor | None]:
    weights, (code, code_gradient, scale, needs, backend) = _split(rest)
    results = kernels(backend).step_input_gradients(input, target, weights, code, code_gradient, scale, needs)
    return wanted(results, needs)


def _step_input_gradients_fake(input: Tensor, target: Tensor | None, *rest: Any) -> list[Tensor | None]:
    *_, needs, _ = rest
    results = [input.new_empty(input.shape), input.new_empty((input if target is None else target).shape)]
    return wanted(results, needs)


_define(
    "squared_error",
    "(Tensor input, Tensor target, str backend) -> Tensor",
    _squared_error,
    _squared_error_fake,
)
_define(
    "squared_error_backward",
    "(Tensor input, Tensor target, Tensor scale, bool[] needs, str backend) -> Tensor[]",
    _squared_error_backward,
    _squared_error_backward_fake,
)
_define(
    "bottleneck",
    f"(Tensor input, {_WEIGHTS}, str activation, bool residual, bool save_code, str backend) -> Tensor[]",
    _bottleneck,
    _bottleneck_fake,
)
_define(
    "bottleneck_backward",
    f"(Tensor grad, Tensor input, {_WEIGHTS}, Tensor code, str activation, bool residual, bool[] needs, str backend)"
    " -> Tensor[]",
    _bottleneck_backward,
    _bottleneck_backward_fake,
)
_define(
    "step",
    f"(Tensor input, Tensor? target, {_WEIGHTS}, str activation, str reduction, bool[] needs, bool save_codes,"
    " str backend) -> Tensor[]",
    _step,
    _step_fake,
)
_define(
    "sparse_step",
    f"(Tensor row_starts, Tensor columns, Tensor values, {_WEIGHTS}, str activation, str reduction, bool[] needs,"
    " str backend) -> Tensor[]",
    _sparse_step,
    _sparse_step_fake,
)
_define(
    "step_input_gradients",
    f"(Tensor input, Tensor? target, {_WEIGHTS}, Tensor code, Tensor code_gradient, Tensor scale, bool[] needs,"
    " str backend) -> Tensor[]",
    _step_input_gradients,
    _step_input_gradients_fake,
)

squared_error: Callable[..., Tensor] = _shortcut("squared_error", _squared_error)
squared_error_backward: Callable[..., list[Any]] = _shortcut("squared_error_backward", _squared_error_backward)
bottleneck: Callable[..., list[Any]] = _shortcut("bottleneck", _bottleneck)
bottleneck_backward: Callable[..., list[Any]] = _shortcut("bottleneck_backward", _bottleneck_backward)
step: Callable[..., list[Any]] = _shortcut("step", _step)
sparse_step: Callable[..., list[Any]] = _shortcut("sparse_step", _sparse_step)
step_input_gradients: Callable[..., list[Any]] = _shortcut("step_input_gradients", _step_input_gradients)
