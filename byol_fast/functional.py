"""The three operations: validate, cast under autocast, choose a backend, run.

``bottleneck_mse_loss`` is what the package exists for: a reconstruction loss and all its gradients without the
reconstruction ever being built.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import autograd, reference
from .backends import FEW_ELEMENTS, Call, choose, current, form
from .remembered import recall, remember, signature
from .validation import (
    REDUCTIONS,
    Operands,
    are_alike,
    autocast_dtype,
    check_bottleneck,
    check_choice,
    check_target,
    check_tensors,
    is_sparse,
    pytorch_suffices,
    shape_of,
    wants_gradients,
)

__all__ = ["Explanation", "bottleneck", "bottleneck_mse_loss", "explain", "mse_loss"]


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None) -> Tensor:
    """Mean squared error: a drop-in replacement of :func:`torch.nn.functional.mse_loss`.

    ``reduction="none"`` and ``weight`` are elementwise work, which PyTorch's own operations do under every backend.

    Args:
        input: floating-point tensor of any shape.
        target: tensor that broadcasts with ``input``; a warning is given if it has to.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: weight of each element, of ``input``'s shape; the mean is then divided by the sum of the weights.

    Returns:
        A 0-dim tensor, or the elementwise errors for ``reduction="none"``, in the dtype the two promote to
        (under autocast: float32).

    Raises:
        TypeError: an argument is no tensor, is sparse, or does not hold floating-point numbers.
        ValueError: unknown reduction, weight of another shape, tensors on different devices.
    """
    alike = weight is None and are_alike(input, target)
    if not alike:
        check_tensors({"input": input, "target": target, "weight": weight})
    check_choice("reduction", reduction, REDUCTIONS)
    if alike and input.is_cpu and input.numel() < FEW_ELEMENTS and current() == "auto" and input.shape == target.shape:
        # What the choice below would come to, without its cost.
        return reference.mse_loss(input, target, reduction)
    if weight is not None and weight.shape != input.shape:
        raise ValueError(f"weight: expected the shape of input, {shape_of(input)}, got {shape_of(weight)}")
    if target.shape != input.shape:
        warnings.warn(
            f"target has shape {shape_of(target)}, input has shape {shape_of(input)}: they are broadcast, which is "
            "likely to give a wrong loss. Please ensure that they have the same shape.",
            stacklevel=2,
        )
        input, target = torch.broadcast_tensors(input, target)
    if weight is not None or reduction == "none":
        return reference.mse_loss(input, target, reduction, weight)
    dtype = input.dtype
    if target.dtype != dtype:
        dtype = torch.promote_types(dtype, target.dtype)
        input, target = input.to(dtype), target.to(dtype)
    call = Call("mse_loss", dtype, input.numel(), gradients=wants_gradients(input, target))
    backend = _backend((input, target), call)
    if backend == "reference":
        return reference.mse_loss(input, target, reduction)
    loss_dtype = dtype if autocast_dtype(input) is None else torch.promote_types(dtype, torch.float32)
    total = autograd.squared_error(input, target, backend)
    loss = total / input.numel() if reduction == "mean" else total
    return autograd.as_dtype(loss, loss_dtype)


def bottleneck(
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None = None,
    encoder_bias: Tensor | None = None,
    decoder_bias: Tensor | None = None,
    *,
    activation: str = "identity",
    residual: bool = False,
) -> Tensor:
    """Encode and decode: ``linear(f(linear(input, encoder_weight, encoder_bias)), decoder_weight, decoder_bias)``.

    Args:
        input: ``[..., in_features]``.
        encoder_weight: ``[rank, in_features]``, as in :class:`torch.nn.Linear`.
        decoder_weight: ``[out_features, rank]``; None ties it to ``encoder_weight.T``.
        encoder_bias: ``[rank]`` or None.
        decoder_bias: ``[out_features]`` or None.
        activation: f, one of ``identity``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``tanh``.
        residual: add ``input`` to the output; needs ``out_features == in_features``.

    Returns:
        ``[..., out_features]`` in the dtype of the arguments (under autocast: in autocast's).

    Raises:
        TypeError: an argument is no tensor, is sparse, or has another dtype than ``input``.
        ValueError: a shape, device or name does not fit; the message names the argument.
    """
    tensors = Operands(input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, None)
    small = _small_bottleneck(tensors, activation, residual)
    if small is not None:
        return small
    call = signature(tensors, activation, bool(residual))
    backend = recall(call) or remember(call, _layer_backend(tensors, activation, residual))
    if backend == "reference":
        return reference.bottleneck(*tensors.operands(), activation=activation, residual=residual)
    tensors = tensors.cast()
    output = autograd.bottleneck(_matrix(tensors.input), tensors.weights(), activation, residual, backend)
    return output.reshape(*input.shape[:-1], tensors.out_features)


def bottleneck_mse_loss(
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None = None,
    encoder_bias: Tensor | None = None,
    decoder_bias: Tensor | None = None,
    *,
    target: Tensor | None = None,
    activation: str = "identity",
    reduction: str = "mean",
) -> Tensor:
    """Squared error of a bottleneck: ``mse_loss(bottleneck(input, …), target)`` without building the reconstruction.

    The formulas are the Gram identity: with Z the code, G = Wdᵀ Wd, Q = (T − bd) Wd and E = Z G − Q, the squared error
    is ‖T − bd‖² + Σ Z ⊙ (E − Q), and all gradients follow from products with X that are K wide.

    Args:
        input: ``[..., in_features]``, or a sparse matrix ``[N, in_features]`` in CSR or COO form, of which no dense row
            is made; it is then its own target and has no gradient.
        encoder_weight: ``[rank, in_features]``, as in :class:`torch.nn.Linear`.
        decoder_weight: ``[out_features, rank]``; None ties it to ``encoder_weight.T``.
        encoder_bias: ``[rank]`` or None.
        decoder_bias: ``[out_features]`` or None.
        target: ``[..., out_features]``; None means ``input``.
        activation: f, one of ``identity``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``tanh``.
        reduction: ``"mean"`` over all elements, ``"sum"``, or ``"none"`` (which builds the reconstruction).

    Returns:
        A 0-dim tensor (for ``"none"``: ``[..., out_features]``) in the dtype of the arguments. Under autocast the
        arguments, the target among them, are cast as for :func:`torch.nn.functional.linear`, and the loss is float32.

    Raises:
        TypeError: an argument is no tensor, is sparse, or has another dtype than ``input``.
        ValueError: a shape, device or name does not fit; the message names the argument.
    """
    tensors = Operands(input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, target)
    call = signature(tensors, activation, reduction)
    backend = recall(call) or remember(call, _loss_backend(tensors, activation, reduction))
    if reduction == "none":
        output = bottleneck(*tensors.operands(), activation=activation)
        return mse_loss(output, input if target is None else target, "none")
    if backend == "reference":
        return reference.bottleneck_mse_loss(
            *tensors.operands(), target=target, activation=activation, reduction=reduction
        )
    loss_dtype = input.dtype
    # A call with a signature is neither sparse nor under autocast.
    if call is None and autocast_dtype(input) is not None:
        loss_dtype = torch.promote_types(input.dtype, torch.float32)
        tensors = tensors.cast()
    options = (tensors.weights(), activation, reduction, loss_dtype, backend)
    if call is None and is_sparse(tensors.input):
        loss: Tensor = _sparse_loss(tensors.input, *options)
    else:
        goal = None if tensors.target is None else _matrix(tensors.target)
        loss = autograd.bottleneck_mse_loss(_matrix(tensors.input), goal, *options)
    return loss


def _layer_backend(tensors: Operands, activation: str, residual: bool) -> str:
    check_bottleneck(tensors, activation)
    if residual and tensors.out_features != tensors.in_features:
        raise ValueError(
            f"residual: expected out_features = in_features = {tensors.in_features} to add the input to the output, "
            f"got out_features = {tensors.out_features}"
        )
    return _backend(tensors.present(), tensors.as_call("bottleneck"))


def _loss_backend(tensors: Operands, activation: str, reduction: str) -> str:
    check_choice("reduction", reduction, REDUCTIONS)
    check_bottleneck(tensors, activation, sparse=True)
    check_target(tensors, reduction)
    return _backend(tensors.present(), tensors.as_call("bottleneck_mse_loss"))


def _small_bottleneck(tensors: Operands, activation: str, residual: bool) -> Tensor | None:
    """The output of a layer that ``auto`` leaves to PyTorch for its size, without the cost of checks and choice.

    None if the call is not one of these.
    """
    if current() != "auto":
        return None
    try:
        if not pytorch_suffices(tensors):
            return None
        output = reference.bottleneck(*tensors.operands(), activation=activation)
    except Exception:
        # The checks name the mistake; an error of which they know nothing shows as it is.
        check_bottleneck(tensors, activation)
        raise
    if not residual:
        return output
    return tensors.input + output if output.shape == tensors.input.shape else None


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, in which form, and why."""

    backend: str
    form: str
    reason: str

    def __str__(self) -> str:
        return f"backend {self.backend} ({self.reason}), form: {self.form}"


def explain(
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None = None,
    encoder_bias: Tensor | None = None,
    decoder_bias: Tensor | None = None,
    *,
    target: Tensor | None = None,
    activation: str = "identity",
) -> Explanation:
    """How :func:`bottleneck_mse_loss` would run on these arguments; it raises the same errors."""
    tensors = Operands(input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, target)
    check_bottleneck(tensors, activation, sparse=True)
    check_target(tensors, "mean")
    call = tensors.as_call("bottleneck_mse_loss")
    if _is_empty(call):
        return Explanation("reference", "direct", "an empty tensor leaves nothing to accelerate")
    choice = choose(tensors.present(), call)
    words = form(choice.backend, call, decoder_weight is None, input.device)
    return Explanation(choice.backend, words, choice.reason)


def _backend(tensors: tuple[Tensor, ...], call: Call) -> str:
    return "reference" if _is_empty(call) else choose(tensors, call).backend


def _is_empty(call: Call) -> bool:
    # Sums over nothing, and their quotients, are left to PyTorch, so that they are what its users expect.
    return call.rows == 0 or call.out_features == 0


# The compiler cannot trace into sparse tensors.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sparse_loss(matrix: Tensor, *options: Any) -> Tensor:
    csr = matrix.to_sparse_csr() if matrix.layout == torch.sparse_coo else matrix
    parts = (csr.crow_indices().long(), csr.col_indices().long(), csr.values())
    return autograd.sparse_bottleneck_mse_loss(parts, *options)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
