"""Kinds of layers: how each is a matrix of outputs by inputs, and what takes its place."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Bottleneck, BottleneckConv2d, BottleneckEmbedding

__all__ = ["Factors", "Kind", "kind_of"]


class Factors:
    """A weight in two: encoder ``[groups, rank, d]`` and decoder ``[groups, o, rank]``; ``[groups·o]`` for the bias."""

    def __init__(self, encoder: Tensor, decoder: Tensor, shift: Tensor | None) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self.shift = shift

    @property
    def rank(self) -> int:
        """Columns of the code, in each group."""
        return self.encoder.shape[1]


class Kind(Protocol):
    """One kind of layer, as ``groups`` matrices ``[o, d]`` that are applied to rows."""

    title: str

    def refuses(self, module: nn.Module) -> str | None:
        """Why a layer of this kind cannot be replaced; None where it can."""

    def matrix(self, module: nn.Module) -> Tensor:
        """``[groups, o, d]``, a view of the weight."""

    def rows(self, module: nn.Module, input: Tensor) -> Tensor:
        """What the matrices are applied to: ``[N, groups, d]``; of an embedding, the indices ``[N]``."""

    def outputs(self, module: nn.Module, output: Tensor) -> Tensor:
        """An output, or its gradient, as ``[N, groups, o]``."""

    def replacement(self, module: nn.Module, factors: Factors) -> nn.Module:
        """A layer that computes the product of the factors."""

    def example(self, module: nn.Module, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An input of this shape to measure time with."""


def _sum(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    if bias is None or shift is None:
        return shift if bias is None else bias.double()
    return bias.double() + shift


class _Floating:
    def refuses(self, module: nn.Module) -> str | None:
        return None

    def example(self, module: nn.Module, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)


class _Linear(_Floating):
    title = "Linear"

    def matrix(self, module: nn.Module) -> Tensor:
        return cast(Tensor, module.weight).unsqueeze(0)

    def rows(self, module: nn.Module, input: Tensor) -> Tensor:
        return input.reshape(-1, 1, input.shape[-1])

    outputs = rows

    def replacement(self, module: nn.Module, factors: Factors) -> nn.Module:
        weight, bias = cast(Tensor, module.weight), _sum(cast("Tensor | None", module.bias), factors.shift)
        outputs, inputs = self.matrix(module).shape[1:]
        layer = Bottleneck(
            inputs, factors.rank, outputs, bias=bias is not None, device=weight.device, dtype=weight.dtype
        )
        return layer.assign_(factors.encoder[0], factors.decoder[0], None, bias)


class _Conv1D(_Linear):
    """transformers' ``Conv1D``: a linear layer whose weight is transposed."""

    title = "Conv1D"

    def matrix(self, module: nn.Module) -> Tensor:
        return cast(Tensor, module.weight).t().unsqueeze(0)


class _Conv2d(_Floating):
    title = "Conv2d"

    def matrix(self, module: nn.Module) -> Tensor:
        conv = cast(nn.Conv2d, module)
        matrices: Tensor = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
        return matrices

    def rows(self, module: nn.Module, input: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, module)
        images = input if input.dim() == 4 else input.unsqueeze(0)
        # torch.nn pads "same" and the modes that are not zeros with these amounts, left, right, top, bottom.
        padding: list[int] = conv._reversed_padding_repeated_twice
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        images = F.pad(images, padding, mode=mode)
        patches = F.unfold(images, cast(Any, conv.kernel_size), dilation=conv.dilation, stride=conv.stride)
        rows: Tensor = patches.transpose(1, 2).flatten(0, 1).unflatten(1, (conv.groups, -1))
        return rows

    def outputs(self, module: nn.Module, output: Tensor) -> Tensor:
        images = output if output.dim() == 4 else output.unsqueeze(0)
        groups = cast(nn.Conv2d, module).groups
        rows: Tensor = images.permute(0, 2, 3, 1).flatten(0, 2).unflatten(1, (groups, -1))
        return rows

    def replacement(self, module: nn.Module, factors: Factors) -> nn.Module:
        conv = cast(nn.Conv2d, module)
        bias = _sum(conv.bias, factors.shift)
        layer = BottleneckConv2d.like(conv, factors.rank, bias is not None)
        return layer.assign_(factors.encoder.flatten(0, 1), factors.decoder.flatten(0, 1), bias)


class _Embedding:
    title = "Embedding"

    def refuses(self, module: nn.Module) -> str | None:
        embedding = cast(nn.Embedding, module)
        if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
            return "max_norm, sparse and scale_grad_by_freq are not those of a bottleneck"
        return None

    def matrix(self, module: nn.Module) -> Tensor:
        return cast(Tensor, module.weight).t().unsqueeze(0)

    def rows(self, module: nn.Module, input: Tensor) -> Tensor:
        return input.reshape(-1)

    def outputs(self, module: nn.Module, output: Tensor) -> Tensor:
        return output.reshape(-1, 1, output.shape[-1])

    def replacement(self, module: nn.Module, factors: Factors) -> nn.Module:
        embedding = cast(nn.Embedding, module)
        layer = BottleneckEmbedding(
            embedding.num_embeddings,
            factors.rank,
            embedding.embedding_dim,
            embedding.padding_idx,
            bias=factors.shift is not None,
            device=embedding.weight.device,
            dtype=embedding.weight.dtype,
        )
        return layer.assign_(factors.encoder[0].T, factors.decoder[0], factors.shift)

    def example(self, module: nn.Module, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randint(cast(nn.Embedding, module).num_embeddings, shape, dtype=dtype, device=device)


# The output projection of torch.nn.MultiheadAttention is a class of its own, to no other end than quantisation.
_KINDS: dict[type, Kind] = {
    nn.Linear: _Linear(),
    nn.modules.linear.NonDynamicallyQuantizableLinear: _Linear(),
    nn.Conv2d: _Conv2d(),
    nn.Embedding: _Embedding(),
}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer, None if it is none that can be replaced."""
    kind = _KINDS.get(type(module))
    # transformers need not be installed for its class to be known.
    if kind is None and f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D":
        return _Conv1D()
    return kind
