"""The two halves of a deployed bottleneck."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..phases import load

__all__ = ["Halves", "load_halves"]


class Halves(NamedTuple):
    """Encoder, activation and decoder of a bottleneck as :func:`byol_fast.deploy` writes it."""

    encoder: nn.Linear
    activation: nn.Module | None
    decoder: nn.Linear

    @property
    def rank(self) -> int:
        """Numbers in a code."""
        return self.encoder.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.encoder.weight.dtype

    def checked_rank(self, rank: int, name: str) -> int:
        """``rank``, to which codes can be cut: those of a linear bottleneck, which are in principal order.

        Raises:
            ValueError: it does not fit; the message begins with ``name``.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"{name}: expected 1 ≤ rank ≤ the model's rank = {self.rank}, got {rank}")
        if self.activation is not None and rank < self.rank:
            kind = type(self.activation).__name__
            raise ValueError(f"{name}: expected {self.rank}, because codes behind {kind} are not nested, got {rank}")
        return rank

    def encode(self, rows: Tensor, rank: int) -> Tensor:
        """The first ``rank`` numbers of each row's code."""
        encoder = self.encoder
        bias = None if encoder.bias is None else encoder.bias[:rank]
        code = nn.functional.linear(rows, encoder.weight[:rank], bias)
        return code if self.activation is None else self.activation(code)

    def decode(self, code: Tensor) -> Tensor:
        """The rows of codes of any rank."""
        return nn.functional.linear(code, self.decoder.weight[:, : code.shape[1]], self.decoder.bias)


def load_halves(path: Path, device: torch.device) -> Halves:
    """Read a deployed bottleneck.

    Raises:
        FileNotFoundError, ValueError: the file is not one.
    """
    model = load(path).to(device)
    parts = dict(model.named_children()) if isinstance(model, nn.Sequential) else {}
    encoder, decoder = parts.get("encoder"), parts.get("decoder")
    if not isinstance(encoder, nn.Linear) or not isinstance(decoder, nn.Linear):
        raise ValueError(f"{path}: expected a deployed bottleneck, found a deployed model of another kind")
    return Halves(encoder, parts.get("activation"), decoder)
