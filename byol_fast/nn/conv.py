"""A convolution in two: k×k to a few channels, then 1×1."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..svd import checked_rank
from .factors import checked_covariance, checked_mean, checked_size, orthogonal_, principal_factors

__all__ = ["BottleneckConv2d"]

_Size = int | tuple[int, int]
_PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class BottleneckConv2d(nn.Module):
    """A convolution to ``rank`` channels a group, and a 1×1 convolution from there.

    The encoder has the kernel, stride, padding and dilation; both have the groups. Encoder and decoder are
    :class:`torch.nn.Conv2d` modules, so the state dict has the keys ``encoder.weight``, ``decoder.weight`` and
    ``decoder.bias``. There is one bias, of the decoder.

    Args:
        in_channels: channels C of the input.
        rank: channels of the code in each group.
        out_channels: channels Cₒ of the output.
        kernel_size, stride, padding, dilation, groups, bias, padding_mode: as of :class:`torch.nn.Conv2d`.

    Shapes:
        input ``[N, C, H, W]`` or ``[C, H, W]``, output as of the convolution.

    Raises:
        TypeError: ``rank`` is no integer.
        ValueError: ``rank`` is < 1, or ``torch.nn.Conv2d`` does not take the other arguments.
    """

    def __init__(
        self,
        in_channels: int,
        rank: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Size | str = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank = checked_size("rank", rank)
        width = self.rank * groups
        self.encoder = nn.Conv2d(
            *(in_channels, width, kernel_size, stride, padding, dilation, groups, False, padding_mode),
            device=device,
            dtype=dtype,
        )
        self.decoder = nn.Conv2d(width, out_channels, 1, groups=groups, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: in each group, encoder rows and decoder columns are orthonormal; the bias is zero."""
        for convolution in (self.encoder, self.decoder):
            for weight in convolution.weight.flatten(1).chunk(convolution.groups):
                orthogonal_(weight)
        if self.decoder.bias is not None:
            nn.init.zeros_(self.decoder.bias)

    def encode(self, input: Tensor) -> Tensor:
        """The code: ``[N, C, H, W]`` → ``[N, groups·rank, Hₒ, Wₒ]``."""
        return cast(Tensor, self.encoder(input))

    def decode(self, code: Tensor) -> Tensor:
        """The output: ``[N, groups·rank, Hₒ, Wₒ]`` → ``[N, Cₒ, Hₒ, Wₒ]``."""
        return cast(Tensor, self.decoder(code))

    def forward(self, input: Tensor) -> Tensor:
        return self.decode(self.encode(input))

    def extra_repr(self) -> str:
        return f"{self.encoder.in_channels} → {self.encoder.out_channels} → {self.decoder.out_channels}"

    @classmethod
    @torch.no_grad()
    def from_conv2d(
        cls, conv: nn.Conv2d, rank: int, *, covariance: Tensor | None = None, mean: Tensor | None = None
    ) -> BottleneckConv2d:
        """The layer closest to a convolution, group by group: of its patches, a convolution is a linear layer.

        Args:
            conv: convolution to approximate; it stays as it is.
            rank: from 1 to min(C/groups · kernel size, Cₒ/groups).
            covariance: ``[groups, d, d]`` with d = C/groups · kernel size (``[d, d]`` for one group): second moment of
                the patches as :func:`torch.nn.functional.unfold` lays them out; or, with ``mean``, their covariance.
            mean: ``[groups, d]`` (or ``[d]``): their mean; the bias then makes up for the mean error of the weight.

        Raises:
            TypeError, ValueError: as :meth:`byol_fast.Bottleneck.from_linear`.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected a torch.nn.Conv2d, got {type(conv).__name__}")
        weights = conv.weight.double().flatten(1).chunk(conv.groups)
        checked_rank(rank, min(weights[0].shape), "min(in_channels / groups · kernel size, out_channels / groups)")
        covariances = _by_group(covariance, 2, conv.groups)
        means = _by_group(mean, 1, conv.groups)
        factors = [
            principal_factors(weight, rank, checked_covariance(group, weight))
            for weight, group in zip(weights, covariances, strict=True)
        ]
        encoder, decoder = (torch.cat(parts) for parts in zip(*factors, strict=True))
        bias = None if conv.bias is None else conv.bias.double()
        if mean is not None:
            lost = torch.cat(
                [
                    (weight - pair[1] @ pair[0]) @ checked_mean(cast(Tensor, center), weight)
                    for weight, pair, center in zip(weights, factors, means, strict=True)
                ]
            )
            bias = lost if bias is None else bias + lost
        return cls.like(conv, rank, bias is not None).assign_(encoder, decoder, bias)

    @classmethod
    def like(cls, conv: nn.Conv2d, rank: int, bias: bool) -> BottleneckConv2d:
        """A fresh layer with the options of a convolution."""
        layer = cls(conv.in_channels, rank, conv.out_channels, **{**_options(conv), "bias": bias})
        return layer.train(conv.training)

    @torch.no_grad()
    def assign_(self, encoder: Tensor, decoder: Tensor, bias: Tensor | None) -> BottleneckConv2d:
        """Copy matrices ``[groups·rank, d]`` and ``[Cₒ, rank]``, and a bias, into the parameters."""
        self.encoder.weight.copy_(encoder.reshape(self.encoder.weight.shape))
        self.decoder.weight.copy_(decoder.reshape(self.decoder.weight.shape))
        if bias is not None and self.decoder.bias is not None:
            self.decoder.bias.copy_(bias)
        return self

    @torch.no_grad()
    def to_conv2d(self) -> nn.Conv2d:
        """The one convolution that computes what this layer does, its weight a product in float64."""
        encoder, decoder = self.encoder, self.decoder
        options = {**_options(encoder), "bias": decoder.bias is not None}
        conv = nn.Conv2d(encoder.in_channels, decoder.out_channels, **options)
        pairs = zip(
            decoder.weight.double().flatten(1).chunk(encoder.groups),
            encoder.weight.double().flatten(1).chunk(encoder.groups),
            strict=True,
        )
        conv.weight.copy_(torch.cat([left @ right for left, right in pairs]).reshape(conv.weight.shape))
        if conv.bias is not None:
            conv.bias.copy_(cast(Tensor, decoder.bias))
        return conv.train(self.training)


def _options(conv: nn.Conv2d) -> dict[str, Any]:
    """What a convolution was made with, but for its channels."""
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(conv, name) for name in names}
    return {**options, "bias": conv.bias is not None, "device": conv.weight.device, "dtype": conv.weight.dtype}


def _by_group(tensor: Tensor | None, dimensions: int, groups: int) -> list[Tensor | None]:
    if tensor is None:
        return [None] * groups
    if tensor.dim() == dimensions:
        return [tensor]
    return list(tensor)
