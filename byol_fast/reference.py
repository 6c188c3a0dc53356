"""The three operations in pure PyTorch: the oracle of every test, and the fallback of every backend.

Formulas (U pre-activation, Z code, X̂ reconstruction, weights in ``nn.Linear`` layout)::

    U = X Weᵀ + be        Z = f(U)        X̂ = Z Wdᵀ + bd   (+ X with ``residual``)        L = mean (X̂ − T)²

Differentiable to any order, in forward and reverse mode, under every ``torch.func`` transform.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


_MSE_LOSS = torch.ops.aten.mse_loss.default
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None) -> Tensor:
    """Squared error of ``input`` and ``target``; see :func:`torch.nn.functional.mse_loss`."""
    if weight is None and input.shape == target.shape:
        # The operation itself: what F.mse_loss does before, to broadcast, takes as long as a small loss.
        return cast(Tensor, _MSE_LOSS(input, target, _REDUCTIONS[reduction]))
    # torch's stubs do not know the argument yet.
    return F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]


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
    """``decode(f(encode(input)))``, input ``[..., D]`` → ``[..., Dₒ]``; tied when ``decoder_weight`` is None."""
    code = ACTIVATIONS[activation](F.linear(input, encoder_weight, encoder_bias))
    decoder = encoder_weight.t() if decoder_weight is None else decoder_weight
    output = F.linear(code, decoder, decoder_bias)
    return input + output if residual else output


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
    """``mse_loss(bottleneck(input, …), target)``, the target being ``input`` itself by default.

    A sparse ``input`` is made dense.
    """
    input = input if input.layout == torch.strided else input.to_dense()
    output = bottleneck(input, encoder_weight, decoder_weight, encoder_bias, decoder_bias, activation=activation)
    return mse_loss(output, input if target is None else target, reduction)
