"""What the operations take: one line for each mistake, which names the argument, what was expected and what came."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends import Call, Weights, is_small

ACTIVATIONS = tuple(reference.ACTIVATIONS)
REDUCTIONS = ("none", "mean", "sum")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STRIDED = torch.strided
_SPARSE = (torch.sparse_csr, torch.sparse_coo)


class Operands(NamedTuple):
    """The tensors of a call."""

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
        autocast = autocast_dtype(self.input)
        dtype = self.input.dtype if autocast is None or self.input.dtype == torch.float64 else autocast
        rank, in_features = self.encoder_weight.shape
        rows = self.input.numel() // in_features
        sparse, gradients = is_sparse(self.input), wants_gradients(*self[:5])
        return Call(operation, dtype, rows, in_features, self.out_features, rank, sparse, gradients)

    def cast(self) -> Operands:
        """Under autocast, everything in autocast's dtype, by the rule of ``linear``: all but float64."""
        dtype = autocast_dtype(self.input)
        if dtype is None:
            return self
        return Operands(*(_cast(tensor, dtype) for tensor in self))  # type: ignore[arg-type]


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Autocast's dtype for the device of this tensor, None where autocast is off."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of one of them."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def is_sparse(tensor: Tensor) -> bool:
    return tensor.layout in _SPARSE


def check_bottleneck(tensors: Operands, activation: str, sparse: bool = False) -> None:
    input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, _ = tensors
    alike = are_alike(*tensors)
    if not alike:
        check_tensors(tensors._asdict(), sparse_input=sparse)
    check_choice("activation", activation, ACTIVATIONS)
    if not alike:
        _check_dtypes(tensors._asdict())
    if encoder_weight.dim() != 2:
        raise _wrong_shape("encoder_weight", encoder_weight, ("rank", "in_features"), (None, None))
    rank, in_features = encoder_weight.shape
    if rank == 0 or in_features == 0:
        raise ValueError(f"encoder_weight: expected rank ≥ 1 and in_features ≥ 1, got shape {shape_of(encoder_weight)}")
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


def check_target(tensors: Operands, reduction: str) -> None:
    """The target of a loss: of the output's shape, or the input itself."""
    if is_sparse(tensors.input):
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
        raise ValueError(f"target: expected shape [..., out_features] = {expected}, got {shape_of(tensors.target)}")


def _check_sparse(tensors: Operands, reduction: str) -> None:
    """What a sparse input cannot do."""
    if tensors.input.dim() != 2 or tensors.input.dense_dim() != 0:
        shape = shape_of(tensors.input)
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


def are_alike(input: Tensor, other: Tensor, *optional: Tensor | None) -> bool:
    """Whether all are dense floating-point tensors of one dtype and device, as they nearly always are."""
    if not isinstance(input, Tensor) or input.dtype not in _FLOATS or input.layout != _STRIDED:
        return False
    dtype, device = input.dtype, input.device
    for tensor in (other, *optional):
        if tensor is None and tensor is not other:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.layout != _STRIDED:
            return False
        if tensor.device != device:
            return False
    return True


def pytorch_suffices(tensors: Operands) -> bool:
    """Whether ``auto`` leaves these CPU tensors to PyTorch for their size, and PyTorch may check the rest.

    Every look at a tensor takes as long as a hundredth of a small call, so what ``linear`` refuses by itself is left to
    it, and its errors have to be caught. Looked for is what it would take: integers, sparse and meta tensors, biases
    that broadcast, a product of nothing.
    """
    input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, _ = tensors
    dtype = input.dtype
    rank, in_features = encoder_weight.shape
    out_features = in_features
    if decoder_weight is not None:
        out_features, _ = decoder_weight.shape
        if decoder_weight.layout is not _STRIDED or not decoder_weight.is_cpu:
            return False
    if (
        dtype not in _FLOATS
        or in_features == 0
        or rank == 0
        or input.layout is not _STRIDED
        or not input.is_cpu
        or encoder_weight.layout is not _STRIDED
        or not encoder_weight.is_cpu
    ):
        return False
    if encoder_bias is not None and (
        encoder_bias.numel() != rank or encoder_bias.dim() != 1 or encoder_bias.dtype is not dtype
    ):
        return False
    if decoder_bias is not None and (
        decoder_bias.numel() != out_features or decoder_bias.dim() != 1 or decoder_bias.dtype is not dtype
    ):
        return False
    return is_small(dtype, input.numel() // in_features, in_features, out_features, rank)


def check_tensors(named: dict[str, Tensor | None], sparse_input: bool = False) -> None:
    device = None
    for name, tensor in named.items():
        if tensor is None and name not in ("input", "target", "encoder_weight"):
            continue
        if tensor is None and name == "target" and "encoder_weight" in named:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided and not (sparse_input and name == "input" and is_sparse(tensor)):
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
    autocast = autocast_dtype(input) is not None
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
    return ValueError(f"{name}: expected shape [{', '.join(symbols)}] = [{numbers}], got {shape_of(tensor)}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
