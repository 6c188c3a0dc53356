"""The autograd Functions of the three operations.

The training step computes its weight gradients in the forward pass, while a tile of X is in cache; the backward pass
only multiplies them by grad_output. Gradients of the input and the target, which are as large as the data, wait for the
backward pass; for them the forward pass keeps the code and its gradient, ``[N, K]`` each, unscaled, so that nothing
underflows in half precision.

The backward pass of each Function is a Function too: the first derivatives come from kernels, their own derivatives
(double backward) from the reference, which autograd differentiates to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from . import ops, reference
from .backends import Weights

_OptionalTensors = Sequence["Tensor | None"]


def squared_error(input: Tensor, target: Tensor, backend: str) -> Tensor:
    """Σ (input − target)² of two tensors of one shape, 0-dim, in the accumulation dtype."""
    if not any(_needs(input, target)):
        return ops.squared_error(input, target, backend)
    total: Tensor = _apply(_SquaredError, input, target, backend)
    return total


def bottleneck(input: Tensor, weights: Weights, activation: str, residual: bool, backend: str) -> Tensor:
    """``decode(f(encode(input)))`` of a matrix ``[N, D]``: ``[N, Dₒ]`` in its dtype."""
    tensors = (input, *weights)
    needs = _needs(*tensors)
    if any(needs):
        results = _apply(_Bottleneck, *tensors, activation, residual, backend)
    else:
        results = ops.bottleneck(*tensors, activation, residual, False, backend)
    output: Tensor = results[0]
    return output


def bottleneck_mse_loss(
    input: Tensor,
    target: Tensor | None,
    weights: Weights,
    activation: str,
    reduction: str,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Mean or sum of (decode(f(encode(input))) − target)², 0-dim, in this dtype; no target: the input."""
    tensors = (input, target, *weights)
    needs = _needs(*tensors)
    if any(needs):
        loss: Tensor = _apply(_Step, *tensors, activation, reduction, dtype, needs, backend)[0]
        return loss
    return as_dtype(ops.step(*tensors, activation, reduction, needs[2:], False, backend)[0], dtype)


def sparse_bottleneck_mse_loss(
    csr: tuple[Tensor, Tensor, Tensor],
    weights: Weights,
    activation: str,
    reduction: str,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """:func:`bottleneck_mse_loss` of an input in CSR form, which is its own target and has no gradient."""
    tensors = (*csr, *weights)
    needs = _needs(*tensors)
    if any(needs):
        loss: Tensor = _apply(_SparseStep, *tensors, activation, reduction, dtype, needs, backend)[0]
        return loss
    return as_dtype(ops.sparse_step(*tensors, activation, reduction, needs[3:], backend)[0], dtype)


def _needs(*tensors: Tensor | None) -> list[bool]:
    """Which of the tensors will want a gradient."""
    enabled = torch.is_grad_enabled()
    return [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # What `apply` does here, but for inspecting the signature for defaults, of which there are none: much code to run
    # through when a kernel has just driven all of it out of the caches.
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


def _backward(function: type[_Kernel], grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """The gradients, tied to the graph only when somebody may differentiate them again."""
    if torch.is_grad_enabled():
        return tuple(_apply(function, grad, *args))
    gradients: tuple[Tensor | None, ...] = function.forward(grad, *args)
    return gradients


def _multiplied(
    gradients: Sequence[Tensor], grad: Tensor, likes: _OptionalTensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    """``grad·gradient`` in the dtype of the tensor it belongs to, None where it is not needed.

    When nobody can ask for them again, the gradients are multiplied where they are, unless grad is 1, as it mostly is.
    A GPU would have to be waited for to learn that.
    """
    wanted = [need and like is not None for like, need in zip(likes, needs, strict=True)]
    chosen = [gradient for gradient, want in zip(gradients, wanted, strict=True) if want]
    if ops.is_watched(grad) or torch._C._autograd._get_current_graph_task_keep_graph():
        chosen = [gradient * grad for gradient in chosen]
    elif chosen and not (grad.is_cpu and grad.item() == 1):
        torch._foreach_mul_(chosen, as_dtype(grad, chosen[0].dtype))
    products = iter(chosen)
    return [
        as_dtype(next(products), like.dtype) if want and like is not None else None
        for like, want in zip(likes, wanted, strict=True)
    ]


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without its cost where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class _Kernel(torch.autograd.Function):
    """What all Functions here have in common."""

    generate_vmap_rule = True


def _second_order(
    function: Callable[..., Tensor],
    inputs: _OptionalTensors,
    needs: Sequence[bool],
    grad: Tensor,
    cotangents: _OptionalTensors,
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product of ``(grad, *inputs) ↦ (gradients of function that are needed)``: (grad, *inputs)."""
    with torch.enable_grad():
        # A view of its own for each argument: the same tensor may be passed twice and must not count twice.
        aliases = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        grad_alias = grad.view_as(grad)
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need and alias is not None]
        output = function(*aliases)
        first = torch.autograd.grad(output, wanted, grad_alias.to(output.dtype), create_graph=True)
        pairs = [
            (gradient, cotangent)
            for gradient, cotangent in zip(first, (c for c, n in zip(cotangents, needs, strict=True) if n), strict=True)
            if cotangent is not None and gradient.requires_grad
        ]
        sources = [grad_alias, *wanted] if grad.requires_grad else wanted
        second = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            sources,
            [cotangent for _, cotangent in pairs],
            create_graph=True,
            allow_unused=True,
        )
    remaining = iter(second)
    grad_of_grad = next(remaining) if grad.requires_grad else None
    return (grad_of_grad, *(next(remaining) if need else None for need in needs))


# -------------------------------------------------------------------------------------------------- squared error


class _SquaredError(_Kernel):
    @staticmethod
    def forward(input: Tensor, target: Tensor, backend: str) -> Tensor:
        return ops.squared_error(input, target, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, target, ctx.backend = inputs
        ctx.save_for_backward(input, target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = _backward(_SquaredErrorBackward, grad, *ctx.saved_tensors, ctx.needs_input_grad[:2], ctx.backend)
        return *gradients, None


class _SquaredErrorBackward(_Kernel):
    @staticmethod
    def forward(
        grad: Tensor, input: Tensor, target: Tensor, needs: Sequence[bool], backend: str
    ) -> tuple[Tensor | None, ...]:
        results = ops.squared_error_backward(input, target, 2 * grad, list(needs), backend)
        return tuple(result if need else None for result, need in zip(results, needs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, input, target, ctx.needs, _ = inputs
        ctx.save_for_backward(grad, input, target)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad, *inputs = ctx.saved_tensors
        return *_second_order(_reference_squared_error, inputs, ctx.needs, grad, cotangents), None, None


def _reference_squared_error(input: Tensor, target: Tensor) -> Tensor:
    return reference.mse_loss(input, target, "sum")


# ----------------------------------------------------------------------------------------------------- bottleneck


class _Bottleneck(_Kernel):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *others, backend = args
        return tuple(ops.bottleneck(*others, True, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.activation, ctx.residual, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        *tensors, code = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        options = (ctx.activation, ctx.residual, needs, ctx.backend)
        return *_backward(_BottleneckBackward, grad, *tensors, code, *options), None, None, None


class _BottleneckBackward(_Kernel):
    @staticmethod
    def forward(grad: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        *others, needs, backend = rest
        results = ops.bottleneck_backward(grad, input, *others, list(needs), backend)
        return tuple(result.to(input.dtype) if need else None for result, need in zip(results, needs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, _, ctx.activation, ctx.residual, ctx.needs, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad, *inputs = ctx.saved_tensors

        def function(*tensors: Any) -> Tensor:
            return reference.bottleneck(*tensors, activation=ctx.activation, residual=ctx.residual)

        gradients = _second_order(function, inputs, ctx.needs, grad, cotangents)
        return *gradients, None, None, None, None, None


# ----------------------------------------------------------------------------------------------- the training step


class _Step(_Kernel):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        *tensors, activation, reduction, dtype, needs, backend = args
        loss, *others = ops.step(*tensors, activation, reduction, needs[2:], any(needs[:2]), backend)
        return as_dtype(loss, dtype), *others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.activation, ctx.reduction, _, ctx.needs, ctx.backend = inputs
        ctx.mark_non_differentiable(*(result for result in output[1:] if result is not None))
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        options = (ctx.activation, ctx.reduction, ctx.needs, ctx.backend)
        return *_backward(_StepBackward, grad, *ctx.saved_tensors, *options), *[None] * 5


class _StepBackward(_Kernel):
    @staticmethod
    def forward(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        tensors, gradients, (code, code_gradient) = args[:6], args[6:10], args[10:12]
        _, reduction, needs, backend = args[12:]
        weights = _multiplied(gradients, grad, tensors[2:], needs[2:])
        if not any(needs[:2]):
            return None, None, *weights
        count = tensors[0].shape[0] * Weights(*tensors[2:]).out_features
        grad = as_dtype(grad, code.dtype)
        scale = 2 * grad / count if reduction == "mean" else 2 * grad
        data = ops.step_input_gradients(*tensors, code, code_gradient, scale, needs[:2], backend)
        return *(result if need else None for result, need in zip(data, needs[:2], strict=True)), *weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.activation, ctx.reduction, ctx.needs, _ = inputs[13:]
        ctx.save_for_backward(*inputs[:7])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad, *inputs = ctx.saved_tensors

        def function(input: Tensor, target: Tensor | None, *weights: Any) -> Tensor:
            return reference.bottleneck_mse_loss(
                input, *weights, target=target, activation=ctx.activation, reduction=ctx.reduction
            )

        return *_second_order(function, inputs, ctx.needs, grad, cotangents), *[None] * 10


# ----------------------------------------------------------------------------------- the step of a sparse input


class _SparseStep(_Kernel):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        *tensors, activation, reduction, dtype, needs, backend = args
        loss, *others = ops.sparse_step(*tensors, activation, reduction, needs[3:], backend)
        return as_dtype(loss, dtype), *others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.activation, ctx.reduction, _, ctx.needs, _ = inputs
        ctx.mark_non_differentiable(*(result for result in output[1:] if result is not None))
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        options = (ctx.activation, ctx.reduction, ctx.needs)
        return *_backward(_SparseStepBackward, grad, *ctx.saved_tensors, *options), *[None] * 5


class _SparseStepBackward(_Kernel):
    @staticmethod
    def forward(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        tensors, gradients, needs = args[:7], args[7:11], args[13]
        return None, None, None, *_multiplied(gradients, grad, tensors[3:], needs[3:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.activation, ctx.reduction, ctx.needs = inputs[12:]
        ctx.save_for_backward(*inputs[:8])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad, row_starts, columns, values, *weights = ctx.saved_tensors
        size = (row_starts.numel() - 1, weights[0].shape[1])
        input = torch.sparse_csr_tensor(row_starts, columns, values, size).to_dense()

        def function(*weights: Any) -> Tensor:
            return reference.bottleneck_mse_loss(input, *weights, activation=ctx.activation, reduction=ctx.reduction)

        grad_of_grad, *second = _second_order(function, weights, ctx.needs[3:], grad, cotangents[3:])
        return grad_of_grad, None, None, None, *second, *[None] * 7
