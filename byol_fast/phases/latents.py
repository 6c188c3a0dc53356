"""Codes instead of data: what a frozen bottleneck makes of the data is made once.

Behind a frozen bottleneck with decoder D, d, a linear layer W, b computes ``W (D z + d) + b = (W D) z + (W d + b)``.
W D is as small as the code, so a step neither encodes nor decodes. W itself stays the parameter, hence its gradient,
and every step of an optimiser, is the same as without.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Bottleneck
from .batches import Array, batches_of

__all__ = ["cache_codes"]


class _FoldedLinear(nn.Module):
    """``linear(decoder(z))`` with the two weights multiplied first; only ``linear`` is a part of it, and trained."""

    def __init__(self, decoder: Any, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        # In a tuple, so that it is not registered as a submodule.
        self._decoder = (decoder,)

    def forward(self, input: Tensor) -> Tensor:
        decoder = self._decoder[0]
        weight, bias, shift = self.linear.weight, self.linear.bias, decoder.bias
        if shift is not None:
            shift = F.linear(shift.detach(), weight, bias)
        return F.linear(input, weight @ decoder.weight.detach(), bias if shift is None else shift)


class _Decoder(nn.Module):
    """A frozen decoder in front of anything but a linear layer."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self._decoder = (decoder,)

    def forward(self, input: Tensor) -> Tensor:
        decoder = self._decoder[0]
        shift = None if decoder.bias is None else decoder.bias.detach()
        return F.linear(input, decoder.weight.detach(), shift)


@torch.no_grad()
def cache_codes(model: nn.Sequential, inputs: Array) -> tuple[nn.Sequential, Tensor]:
    """Split a model that begins with a bottleneck into the codes of its inputs and a head that takes codes.

    The head shares its parameters with ``model``, so to fine-tune it on the codes is to fine-tune ``model`` with its
    bottleneck frozen::

        head, codes = bf.cache_codes(model, inputs)
        bf.finetune(head, (codes, labels), loss=F.cross_entropy)      # trains model, too

    A linear layer right behind the bottleneck takes the decoder in, so that no step decodes.

    Args:
        model: an ``nn.Sequential`` whose first part is a :class:`Bottleneck` without residual.
        inputs: ``[N, in_features]``, a tensor, an array or a sparse matrix; it is read in blocks of rows.

    Returns:
        The head, and the codes ``[N, rank]`` on the model's device.

    Raises:
        TypeError: ``model`` does not begin with a bottleneck, or ``inputs`` is no array.
        ValueError: the bottleneck is residual: the head would need the inputs.
    """
    layer = model[0] if isinstance(model, nn.Sequential) and len(model) else None
    if not isinstance(layer, Bottleneck):
        raise TypeError(
            "model: expected an nn.Sequential that begins with a Bottleneck, got "
            + (type(model).__name__ if layer is None else f"one that begins with {type(layer).__name__}")
        )
    if layer.residual:
        raise ValueError("model: expected a Bottleneck without residual, whose output is all that the rest needs")
    weight = layer.encoder.weight
    codes = torch.cat(
        [
            layer.encode(batch.tensors[0].to(weight.device, weight.dtype))
            for batch in batches_of(inputs, None, "inputs").in_order()
        ]
    )
    rest = list(model.children())[1:]
    if rest and type(rest[0]) is nn.Linear:
        head = nn.Sequential(_FoldedLinear(layer.decoder, rest[0]), *rest[1:])
    else:
        head = nn.Sequential(_Decoder(layer.decoder), *rest)
    return head.train(model.training), codes
