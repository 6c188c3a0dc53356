"""The three operations: validate, cast under autocast, choose a backend, run.

``bottleneck_mse_loss`` is what the package exists for: a reconstruction loss and all its gradients without the
reconstruction ever being built.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd, reference
from .backends import Call, Weights, choose, form

__all__ = ["Explanation", "bottleneck", "bottleneck_mse_loss", "explain", "mse_loss"]

_REDUCTIONS = ("none", "mean", "sum")
_ACTIVATIONS = tuple(reference.ACTIVATIONS)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SPARSE = (torch.sparse_csr, torch.sparse_coo)


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
    if weight is not None or not _are_alike(input, target):
        _check_tensors({"input": input, "target": target, "weight": weight})
    _check_choice("reduction", reduction, _REDUCTIONS)
    if weight is not None and weight.shape != input.shape:
        raise ValueError(f"weight: expected the shape of input, {_shape(input)}, got {_shape(weight)}")
    if target.shape != input.shape:
        warnings.warn(
            f"target has shape {_shape(target)}, input has shape {_shape(input)}: they are broadcast, which is likely "
            "to give a wrong loss. Please ensure that they have the same shape.",
            stacklevel=2,
        )
        input, target = torch.broadcast_tensors(input, target)
    if weight is not None or reduction == "none":
        return reference.mse_loss(input, target, reduction, weight)
    dtype = input.dtype if input.dtype == target.dtype else torch.promote_types(input.dtype, target.dtype)
    loss_dtype = torch.promote_types(dtype, torch.float32) if _autocast_dtype(input) is not None else dtype
    input, target = input.to(dtype), target.to(dtype)
    backend = _backend((input, target), Call("mse_loss", dtype, input.numel()))
    if backend == "reference":
        return reference.mse_loss(input, target, reduction)
    return _reduced(autograd.squared_error(input, target, backend), reduction, input.numel(), loss_dtype)


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
    tensors = _check_bottleneck(input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, activation)
    if residual and tensors.out_features != tensors.in_features:
        raise ValueError(
            f"residual: expected out_features = in_features = {tensors.in_features} to add the input to the output, "
            f"got out_features = {tensors.out_features}"
        )
    backend = _backend(tensors.present(), tensors.as_call("bottleneck"))
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
    _check_choice("reduction", reduction, _REDUCTIONS)
    tensors = _check_bottleneck(
        input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, activation, target, sparse=True
    )
    _check_target(tensors, reduction)
    if reduction == "none":
        output = bottleneck(*tensors.operands(), activation=activation)
        return mse_loss(output, input if target is None else target, "none")
    backend = _backend(tensors.present(), tensors.as_call("bottleneck_mse_loss"))
    if backend == "reference":
        return reference.bottleneck_mse_loss(
            *tensors.operands(), target=target, activation=activation, reduction=reduction
        )
    loss_dtype = input.dtype if _autocast_dtype(input) is None else torch.promote_types(input.dtype, torch.float32)
    tensors = tensors.cast()
    if _is_sparse(tensors.input):
        total = _sparse_squared_error(tensors.input, tensors.weights(), activation, backend)
    else:
        goal = None if tensors.target is None else _matrix(tensors.target)
        total = autograd.bottleneck_squared_error(_matrix(tensors.input), goal, tensors.weights(), activation, backend)
    count = input.numel() // tensors.in_features * tensors.out_features
    return _reduced(total, reduction, count, loss_dtype)


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
    tensors = _check_bottleneck(
        input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, activation, target, sparse=True
    )
    _check_target(tensors, "mean")
    call = tensors.as_call("bottleneck_mse_loss")
    if _is_empty(call):
        return Explanation("reference", "direct", "an empty tensor leaves nothing to accelerate")
    choice = choose(tensors.present(), call)
    words = form(choice.backend, call.dtype, decoder_weight is None, _is_sparse(input))
    return Explanation(choice.backend, words, choice.reason)


class _Bottleneck(NamedTuple):
    """The checked tensors of a call."""

    input: Tensor
    encoder_weight: Tensor
    decoder_weight: Tensor | None
    encoder_bias: Tensor | None
    decoder_bias: Tensor | None
    target: Tensor | None

    @property
    def in_features(self) -> int:
        return self.encoder_weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.in_features if self.decoder_weight is None else self.decoder_weight.shape[0]

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self[:5]

    def weights(self) -> Weights:
        return Weights(*self[1:5])

    def present(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self if tensor is not None)

    def as_call(self, operation: str) -> Call:
        """What the backends are asked for."""
        autocast = _autocast_dtype(self.input)
        dtype = self.input.dtype if autocast is None or self.input.dtype == torch.float64 else autocast
        rank, in_features = self.encoder_weight.shape
        rows = self.input.numel() // in_features
        return Call(operation, dtype, rows, in_features, self.out_features, rank, _is_sparse(self.input))

    def cast(self) -> _Bottleneck:
        """Under autocast, everything in autocast's dtype, by the rule of ``linear``: all but float64."""
        dtype = _autocast_dtype(self.input)
        if dtype is None:
            return self
        return _Bottleneck(*(_cast(tensor, dtype) for tensor in self))  # type: ignore[arg-type]


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Autocast's dtype for the device of this tensor, None where autocast is off."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def _backend(tensors: tuple[Tensor, ...], call: Call) -> str:
    return "reference" if _is_empty(call) else choose(tensors, call).backend


def _is_empty(call: Call) -> bool:
    # Sums over nothing, and their quotients, are left to PyTorch, so that they are what its users expect.
    return call.rows == 0 or call.out_features == 0


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout in _SPARSE


# The compiler cannot trace into sparse tensors.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sparse_squared_error(matrix: Tensor, weights: Weights, activation: str, backend: str) -> Tensor:
    csr = matrix.to_sparse_csr() if matrix.layout == torch.sparse_coo else matrix
    parts = (csr.crow_indices().long(), csr.col_indices().long(), csr.values())
    return autograd.sparse_bottleneck_squared_error(parts, weights, activation, backend)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _reduced(total: Tensor, reduction: str, count: int, dtype: torch.dtype) -> Tensor:
    return (total / count if reduction == "mean" else total).to(dtype)


# ----------------------------------------------------------------------------------------------------- validation


def _check_bottleneck(
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None,
    encoder_bias: Tensor | None,
    decoder_bias: Tensor | None,
    activation: str,
    target: Tensor | None = None,
    sparse: bool = False,
) -> _Bottleneck:
    tensors = _Bottleneck(input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, target)
    alike = _are_alike(*tensors)
    if not alike:
        _check_tensors(tensors._asdict(), sparse_input=sparse)
    _check_choice("activation", activation, _ACTIVATIONS)
    if not alike:
        _check_dtypes(tensors._asdict())
    if encoder_weight.dim() != 2:
        raise _wrong_shape("encoder_weight", encoder_weight, ("rank", "in_features"), (None, None))
    rank, in_features = encoder_weight.shape
    if rank == 0 or in_features == 0:
        raise ValueError(f"encoder_weight: expected rank ≥ 1 and in_features ≥ 1, got shape {_shape(encoder_weight)}")
    if input.shape[-1:] != (in_features,):
        raise _wrong_shape("input", input, ("...", "in_features"), (in_features,))
    out_features = in_features
    if decoder_weight is not None:
        if decoder_weight.dim() != 2 or decoder_weight.shape[1] != rank:
            raise _wrong_shape("decoder_weight", decoder_weight, ("out_features", "rank"), (None, rank))
        out_features = decoder_weight.shape[0]
    if encoder_bias is not None and encoder_bias.shape != (rank,):
        raise _wrong_shape("encoder_bias", encoder_bias, ("rank",), (rank,))
    if decoder_bias is not None and decoder_bias.shape != (out_features,):
        raise _wrong_shape("decoder_bias", decoder_bias, ("out_features",), (out_features,))
    return tensors


def _check_target(tensors: _Bottleneck, reduction: str) -> None:
    """The target of a loss: of the output's shape, or the input itself."""
    if _is_sparse(tensors.input):
        _check_sparse(tensors, reduction)
        return
    expected = [*tensors.input.shape[:-1], tensors.out_features]
    if tensors.target is None:
        if tensors.out_features != tensors.in_features:
            raise ValueError(
                f"target: expected shape [..., out_features] = {expected}, for out_features differs from in_features = "
                f"{tensors.in_features}, got None"
            )
    elif list(tensors.target.shape) != expected:
        raise ValueError(f"target: expected shape [..., out_features] = {expected}, got {_shape(tensors.target)}")


def _check_sparse(tensors: _Bottleneck, reduction: str) -> None:
    """What a sparse input cannot do."""
    if tensors.input.dim() != 2 or tensors.input.dense_dim() != 0:
        shape = _shape(tensors.input)
        raise ValueError(f"input: expected a sparse matrix [N, in_features] of scalars, got shape {shape}")
    if tensors.target is not None:
        raise ValueError("target: expected None, for a sparse input is its own target, got a tensor")
    if tensors.out_features != tensors.in_features:
        raise ValueError(
            f"decoder_weight: expected out_features = in_features = {tensors.in_features}, for a sparse input is its "
            f"own target, got {tensors.out_features}"
        )
    if reduction == "none":
        raise ValueError("reduction: expected mean or sum for a sparse input, got 'none'")
    if tensors.input.requires_grad:
        raise ValueError("input: expected a sparse input that requires no gradient, got requires_grad=True")


def _are_alike(input: Tensor, other: Tensor, *optional: Tensor | None) -> bool:
    """Whether all are dense floating-point tensors of one dtype and device, as they nearly always are."""
    if not isinstance(input, Tensor) or input.dtype not in _FLOATS or input.layout != torch.strided:
        return False
    dtype, device = input.dtype, input.device
    return all(
        isinstance(tensor, Tensor)
        and tensor.dtype == dtype
        and tensor.layout == torch.strided
        and tensor.device == device
        for tensor in (other, *optional)
        if tensor is not None or tensor is other
    )


def _check_tensors(named: dict[str, Tensor | None], sparse_input: bool = False) -> None:
    device = None
    for name, tensor in named.items():
        if tensor is None and name not in ("input", "target", "encoder_weight"):
            continue
        if tensor is None and name == "target" and "encoder_weight" in named:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided and not (sparse_input and name == "input" and _is_sparse(tensor)):
            expected = (
                "a strided, sparse_csr or sparse_coo tensor"
                if sparse_input and name == "input"
                else "a dense (strided) tensor"
            )
            raise TypeError(f"{name}: expected {expected}, got layout {tensor.layout}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if device is not None and tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, where input is, got one on {tensor.device}")
        device = tensor.device


def _check_dtypes(named: dict[str, Tensor | None]) -> None:
    """One dtype, as ``linear`` demands; autocast does away with the differences, but for float64."""
    input = named["input"]
    if input is None:
        return
    autocast = _autocast_dtype(input) is not None
    for name, tensor in named.items():
        if tensor is None or tensor.dtype == input.dtype:
            continue
        # A kernel would read one dtype as the other.
        if not autocast or torch.float64 in (tensor.dtype, input.dtype):
            raise TypeError(f"{name}: expected the dtype of input, {input.dtype}, got {tensor.dtype}")


def _wrong_shape(name: str, tensor: Tensor, symbols: tuple[str, ...], sizes: tuple[int | None, ...]) -> ValueError:
    """The last dimensions should have been ``sizes`` (None: any)."""
    leading = ["..."] if symbols[0] == "..." else []
    numbers = ", ".join((*leading, *("any" if size is None else str(size) for size in sizes)))
    return ValueError(f"{name}: expected shape [{', '.join(symbols)}] = [{numbers}], got {_shape(tensor)}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
