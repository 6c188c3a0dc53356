"""An embedding table of a few columns, and the linear map from there."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..svd import checked_rank
from .factors import checked_size, orthogonal_, principal_factors

__all__ = ["BottleneckEmbedding"]


class BottleneckEmbedding(nn.Module):
    """An embedding of ``rank`` columns and a linear decoder to ``embedding_dim``.

    Encoder and decoder are an :class:`torch.nn.Embedding` and an :class:`torch.nn.Linear`, so the state dict has the
    keys ``encoder.weight``, ``decoder.weight`` and, with a bias, ``decoder.bias``.

    Args:
        num_embeddings: entries V of the table.
        rank: columns of the table.
        embedding_dim: size D of an output.
        padding_idx: entry that gets no gradient, as of :class:`torch.nn.Embedding`.
        bias: whether the decoder has a bias.

    Shapes:
        input ``[...]`` of integers, output ``[..., D]``.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is < 1.
    """

    def __init__(
        self,
        num_embeddings: int,
        rank: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_embeddings": num_embeddings, "rank": rank, "embedding_dim": embedding_dim}
        for name, size in sizes.items():
            checked_size(name, size)
        self.rank = rank
        self.encoder = nn.Embedding(num_embeddings, rank, padding_idx, device=device, dtype=dtype)
        self.decoder = nn.Linear(rank, embedding_dim, bias, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: the table as that of an nn.Embedding, the decoder with orthonormal columns."""
        self.encoder.reset_parameters()
        orthogonal_(self.decoder.weight)
        if self.decoder.bias is not None:
            nn.init.zeros_(self.decoder.bias)

    @property
    def padding_idx(self) -> int | None:
        """The entry that gets no gradient."""
        return self.encoder.padding_idx

    def encode(self, input: Tensor) -> Tensor:
        """The code: ``[...]`` → ``[..., rank]``."""
        return cast(Tensor, self.encoder(input))

    def decode(self, code: Tensor) -> Tensor:
        """The output: ``[..., rank]`` → ``[..., D]``."""
        return cast(Tensor, self.decoder(code))

    def forward(self, input: Tensor) -> Tensor:
        return self.decode(self.encode(input))

    def extra_repr(self) -> str:
        return f"{self.encoder.num_embeddings} → {self.rank} → {self.decoder.out_features}"

    @classmethod
    @torch.no_grad()
    def from_embedding(
        cls, embedding: nn.Embedding, rank: int, *, frequency: Tensor | None = None
    ) -> BottleneckEmbedding:
        """The layer closest to an embedding, by truncated SVD in float64.

        Args:
            embedding: table to approximate; it stays as it is.
            rank: from 1 to min(V, D).
            frequency: ``[V]``, how often each entry occurs (any multiple will do): errors count as often.

        Raises:
            TypeError: ``embedding`` is no ``nn.Embedding``, or ``rank`` no integer.
            ValueError: ``rank`` or the shape of ``frequency`` does not fit.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding: expected a torch.nn.Embedding, got {type(embedding).__name__}")
        table = embedding.weight.double()
        checked_rank(rank, min(table.shape), "min(num_embeddings, embedding_dim)")
        weighted = table
        if frequency is not None:
            if frequency.shape != table.shape[:1]:
                raise ValueError(
                    f"frequency: expected shape [num_embeddings] = [{len(table)}], got {list(frequency.shape)}"
                )
            # Entries that never occurred count, too, where nothing else decides.
            weight = frequency.to(table.device, torch.float64)
            weighted = table * weight.maximum(1e-10 * weight.amax()).sqrt()[:, None]
        _, decoder = principal_factors(weighted.T, rank, None)
        decoder = torch.linalg.qr(decoder).Q
        layer = cls(
            *(embedding.num_embeddings, rank, embedding.embedding_dim, embedding.padding_idx),
            device=table.device,
            dtype=embedding.weight.dtype,
        )
        return layer.train(embedding.training).assign_(table @ decoder, decoder, None)

    @torch.no_grad()
    def assign_(self, table: Tensor, decoder: Tensor, bias: Tensor | None) -> BottleneckEmbedding:
        """Copy a table ``[V, rank]``, a matrix ``[D, rank]`` and a bias into the parameters."""
        self.encoder.weight.copy_(table)
        self.decoder.weight.copy_(decoder)
        if bias is not None and self.decoder.bias is not None:
            self.decoder.bias.copy_(bias)
        return self

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """The one embedding that computes what this layer does."""
        weight = self.encoder.weight.double() @ self.decoder.weight.double().T
        if self.decoder.bias is not None:
            weight = weight + self.decoder.bias.double()
        embedding = nn.Embedding(
            *(len(weight), weight.shape[1], self.padding_idx),
            device=self.encoder.weight.device,
            dtype=self.encoder.weight.dtype,
        )
        embedding.weight.copy_(weight)
        return embedding.train(self.training)
