"""A low-rank pair of linear maps, and its reconstruction loss."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..svd import checked_rank
from .factors import (
    canonical_factors,
    checked_covariance,
    checked_mean,
    checked_size,
    orthogonal_,
    principal_factors,
    principal_rotation,
)

__all__ = ["Bottleneck", "TiedDecoder"]


class _HasEncoder(Protocol):
    encoder: nn.Linear


class TiedDecoder(nn.Module):
    """The decoder of a tied :class:`Bottleneck`: it owns a bias and uses the transpose of the encoder's weight.

    The weight is read from the layer at every call, so the encoder can be copied, cast, re-loaded or replaced freely.
    """

    def __init__(
        self,
        layer: _HasEncoder,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        # In a tuple, so that it is not registered as a submodule: the layer is this module's parent.
        self._layer = (layer,)

    @property
    def weight(self) -> Tensor:
        """``[out_features, rank]``, a view of the encoder's weight."""
        return self._layer[0].encoder.weight.t()

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"weight=encoder.weight.T, bias={self.bias is not None}"


class Bottleneck(nn.Module):
    """A linear encoder to ``rank`` features, an activation, and a linear decoder.

    ``y = decoder(f(encoder(x)))``, plus x with ``residual``. Encoder and decoder are :class:`torch.nn.Linear` modules,
    so the state dict has the keys ``encoder.weight``, ``encoder.bias``, ``decoder.weight`` and ``decoder.bias``, and
    the checkpoints of such a pair load as they are.

    :meth:`forward` and :meth:`reconstruction_loss` run as one fused operation on the weights and do not call the two
    submodules. If one of these has hooks or is no plain ``nn.Linear`` any more (parametrized, quantized, wrapped by an
    adapter), they are called after all, so that nothing is skipped.

    The weights start as a random orthogonal projection: the encoder's rows (columns, if fewer) are orthonormal, the
    decoder is its transpose, biases are zero. Without an activation, the reconstruction error then starts below the
    energy of the data, where two independent random matrices start above it. A decoder with another number of outputs
    gets orthonormal columns of its own; that of a residual layer starts at zero, so that the layer starts as the
    identity.

    Args:
        in_features: size D of each input.
        rank: size K of the code.
        out_features: size Dₒ of each output; None means ``in_features``.
        bias: whether encoder and decoder have biases.
        activation: f, one of ``identity``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``tanh``.
        residual: add the input to the output; needs ``out_features == in_features``.
        tied: the decoder uses ``encoder.weight.T`` (:class:`TiedDecoder`); needs ``out_features == in_features``.

    Shapes:
        input ``[..., in_features]``, code ``[..., rank]``, output ``[..., out_features]``.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is < 1, the activation is unknown, or residual or tied do not fit the sizes.
    """

    def __init__(
        self,
        in_features: int,
        rank: int,
        out_features: int | None = None,
        *,
        bias: bool = True,
        activation: str = "identity",
        residual: bool = False,
        tied: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checked_size("in_features", in_features)
        self.rank = checked_size("rank", rank)
        self.out_features = self.in_features if out_features is None else checked_size("out_features", out_features)
        if activation not in reference.ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
        for name, flag in (("residual", residual), ("tied", tied)):
            if flag and self.out_features != self.in_features:
                raise ValueError(
                    f"{name}: expected out_features = in_features = {self.in_features}, "
                    f"got out_features = {self.out_features}"
                )
        self.activation = activation
        self.residual = residual
        self.encoder = nn.Linear(self.in_features, self.rank, bias, device, dtype)
        self.decoder = (
            TiedDecoder(self, self.out_features, bias, device, dtype)
            if tied
            else nn.Linear(self.rank, self.out_features, bias, device, dtype)
        )
        self.reset_parameters()

    @property
    def tied(self) -> bool:
        """Whether the decoder uses the encoder's weight."""
        return isinstance(self.decoder, TiedDecoder)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as described above."""
        orthogonal_(self.encoder.weight)
        for bias in (self.encoder.bias, self.decoder.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.tied:
            return
        if self.residual:
            nn.init.zeros_(self.decoder.weight)
        elif self.out_features == self.in_features:
            self.decoder.weight.copy_(self.encoder.weight.t())
        else:
            orthogonal_(self.decoder.weight)

    def encode(self, input: Tensor) -> Tensor:
        """The code: ``[..., in_features]`` → ``[..., rank]``."""
        return reference.ACTIVATIONS[self.activation](self.encoder(input))

    def decode(self, code: Tensor) -> Tensor:
        """The decoder's output: ``[..., rank]`` → ``[..., out_features]``, to which a residual layer adds the input."""
        return cast(Tensor, self.decoder(code))

    def forward(self, input: Tensor) -> Tensor:
        weights = self._plain_weights()
        if weights is None:
            output = self.decode(self.encode(input))
            return input + output if self.residual else output
        return functional.bottleneck(input, *weights, activation=self.activation, residual=self.residual)

    def reconstruction_loss(self, input: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """``mse_loss(self(input), target)`` without building the reconstruction.

        Args:
            input: ``[..., in_features]``.
            target: ``[..., out_features]``; None means ``input``.
            reduction: ``"mean"``, ``"sum"``, or ``"none"`` (which builds the reconstruction).

        Raises:
            TypeError, ValueError: as :func:`byol_fast.bottleneck_mse_loss`.
        """
        weights = self._plain_weights()
        if weights is None:
            return functional.mse_loss(self(input), input if target is None else target, reduction)
        if self.residual:
            # The input is part of the output, so the decoder has to make what is missing to the target.
            target = (input if target is None else target) - input
        return functional.bottleneck_mse_loss(
            input, *weights, target=target, activation=self.activation, reduction=reduction
        )

    def _plain_weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
        """What the fused operation takes; None if calling the two submodules would do more than it does."""
        encoder, decoder = self.encoder, self.decoder
        if type(encoder) is not nn.Linear or _is_hooked(encoder) or _is_hooked(decoder):
            return None
        if type(decoder) is nn.Linear:
            return encoder.weight, decoder.weight, encoder.bias, decoder.bias
        return (encoder.weight, None, encoder.bias, decoder.bias) if type(decoder) is TiedDecoder else None

    def extra_repr(self) -> str:
        options = [f"activation={self.activation}"] if self.activation != "identity" else []
        options += [name for name in ("residual", "tied") if getattr(self, name)]
        return ", ".join([f"{self.in_features} → {self.rank} → {self.out_features}", *options])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # What a tied layer can hold of an untied one's checkpoint: two weights that are each other's transpose.
        decoder_weight = state_dict.pop(prefix + "decoder.weight", None) if self.tied else None
        if decoder_weight is not None:
            encoder_weight = state_dict.get(prefix + "encoder.weight")
            if encoder_weight is None or not torch.equal(decoder_weight, encoder_weight.t()):
                errors: list[str] = args[-1]
                errors.append(
                    f"{prefix}decoder.weight: expected the transpose of encoder.weight, because this layer is tied; "
                    "a checkpoint with two different weights needs a Bottleneck with tied=False"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ------------------------------------------------------------------------------------------- linear algebra

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Linear, rank: int, *, covariance: Tensor | None = None, mean: Tensor | None = None
    ) -> Bottleneck:
        """The bottleneck closest to a linear layer, by truncated SVD in float64.

        Without ``covariance``, it is closest in its weight W: the truncated SVD. With it, in its *output*, over inputs
        of that second moment C: the decoder spans the leading eigenvectors P of W C Wᵀ and the encoder is Pᵀ W, which
        minimises E‖W x − V x‖² among all V of this rank. The code is in principal order, and each of its units has
        encoder and decoder weights of equal norm.

        Args:
            linear: layer to approximate; it stays as it is.
            rank: from 1 to min(in_features, out_features).
            covariance: ``[in_features, in_features]``, the inputs' second moment XᵀX / N (any multiple will do), or,
                together with ``mean``, their covariance.
            mean: ``[in_features]``, the inputs' mean; the bias then makes up for the mean error of the weight.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, or ``rank`` no integer.
            ValueError: ``rank`` or the shape of ``covariance`` or ``mean`` does not fit, or the weight is not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        checked_rank(rank, min(weight.shape), "min(in_features, out_features)")
        encoder, decoder = principal_factors(weight.double(), rank, checked_covariance(covariance, weight))
        bias = None if linear.bias is None else linear.bias.double()
        if mean is not None:
            lost = (weight.double() - decoder @ encoder) @ checked_mean(mean, weight)
            bias = lost if bias is None else bias + lost
        layer = cls(
            linear.in_features,
            rank,
            linear.out_features,
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        return layer.train(linear.training).assign_(encoder, decoder, None, bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The one linear layer that computes what this one does, its weight a product in float64.

        Raises:
            ValueError: the activation is not the identity.
        """
        encoder, encoder_bias, decoder, decoder_bias = self.factors("to_linear")
        weight = decoder @ encoder
        if self.residual:
            weight.diagonal().add_(1)
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.encoder.bias is not None,
            device=self.encoder.weight.device,
            dtype=self.encoder.weight.dtype,
        )
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(decoder @ encoder_bias + decoder_bias)
        return linear.train(self.training)

    @torch.no_grad()
    def canonicalize(self, *, covariance: Tensor | None = None, mean: Tensor | None = None) -> Bottleneck:
        """A layer that computes the same, with its code rotated into principal order; this one stays as it is.

        Code units become uncorrelated, the one that carries most of the output first, so that :meth:`truncate` loses as
        little as possible. What "most" means depends on the inputs, so give their moments (of a :class:`StreamingPCA`,
        for instance); without, they count as white: covariance I, mean 0. The code of a layer with biases is centred.

        A tied layer stays tied, so its code can only be rotated: into the principal axes of the code.

        Args:
            covariance: ``[in_features, in_features]``, covariance of the inputs.
            mean: ``[in_features]``, their mean.

        Raises:
            ValueError: the activation is not the identity, or the shape of ``covariance`` or ``mean`` does not fit.
        """
        encoder, encoder_bias, decoder, decoder_bias = self.factors("canonicalize")
        covariance = checked_covariance(covariance, self.encoder.weight)
        center = torch.zeros_like(encoder[0]) if mean is None else checked_mean(mean, self.encoder.weight)
        if self.tied:
            new_encoder = principal_rotation(encoder, covariance) @ encoder
            new_decoder = new_encoder.T
        else:
            new_encoder, new_decoder = canonical_factors(encoder, decoder, covariance)
        # The mean of the code moves into the decoder's bias, so that cutting a unit does not shift the output.
        new_bias = decoder_bias + decoder @ (encoder @ center + encoder_bias)
        return self._resized(self.rank).assign_(new_encoder, new_decoder, -new_encoder @ center, new_bias)

    @torch.no_grad()
    def truncate(self, rank: int) -> Bottleneck:
        """A layer with the first ``rank`` units of the code only; this one stays as it is.

        Codes are nested: ``self.truncate(k).encode(x)`` is ``self.encode(x)[..., :k]``. Which units come first is up to
        :meth:`canonicalize`.

        Raises:
            TypeError: ``rank`` is no integer.
            ValueError: ``rank`` is not in 1 … the rank of this layer.
        """
        rank = checked_rank(rank, self.rank, "the layer's rank")
        encoder, encoder_bias, decoder, decoder_bias = self._in_float64()
        return self._resized(rank).assign_(encoder[:rank], decoder[:, :rank], encoder_bias[:rank], decoder_bias)

    @torch.no_grad()
    def factors(self, purpose: str = "factors") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The two linear maps in float64: encoder weight and bias, decoder weight and bias; no bias is zeros.

        Raises:
            ValueError: the activation is not the identity; the message says for what ``purpose`` it has to be.
        """
        if self.activation != "identity":
            raise ValueError(f"{purpose}: expected a layer with activation identity, got {self.activation}")
        return self._in_float64()

    def _in_float64(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the encoder and of the decoder; zeros where there is no bias."""
        encoder, decoder = self.encoder.weight.double(), self.decoder.weight.double()
        biases = [
            weight.new_zeros(weight.shape[0]) if bias is None else bias.double()
            for weight, bias in ((encoder, self.encoder.bias), (decoder, self.decoder.bias))
        ]
        return encoder, biases[0], decoder, biases[1]

    @torch.no_grad()
    def assign_(
        self, encoder: Tensor, decoder: Tensor, encoder_bias: Tensor | None, decoder_bias: Tensor | None
    ) -> Bottleneck:
        """Copy these weights and biases into the parameters this layer has; None leaves a bias as it is."""
        self.encoder.weight.copy_(encoder)
        if not self.tied:
            self.decoder.weight.copy_(decoder)
        for bias, value in ((self.encoder.bias, encoder_bias), (self.decoder.bias, decoder_bias)):
            if bias is not None and value is not None:
                bias.copy_(value)
        return self

    def _resized(self, rank: int) -> Bottleneck:
        """A fresh layer with this one's options."""
        return Bottleneck(
            self.in_features,
            rank,
            self.out_features,
            bias=self.encoder.bias is not None,
            activation=self.activation,
            residual=self.residual,
            tied=self.tied,
            device=self.encoder.weight.device,
            dtype=self.encoder.weight.dtype,
        ).train(self.training)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
