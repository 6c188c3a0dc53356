"""Recommendation by a linear bottleneck autoencoder on a sparse matrix of users and items.

With X the users' interactions ``[users, items]``, n_u and n_i how many each user and each item has, the bottleneck is
trained on ``X̃ = diag(n_u)^-a X diag(n_i)^-b``: a < ½ or so, so that those who have much do not decide everything. Its
reconstruction in the scale of X is the score, ``x diag(n_i)^-b Weᵀ S Wdᵀ diag(n_i)^b``; the users' factors cancel.

S shrinks the code's directions to what they hold beyond noise: with C = ZᵀZ the scatter of the code, in coordinates in
which the decoder is orthonormal, ``S = C (C + λ I)⁻¹``. That is ridge regression within the code, and, for b = ½, the
optimum of a denoising autoencoder of which a share of the inputs is dropped (Steck, NeurIPS 2020, section 3).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .nn import Bottleneck
from .phases import PretrainResult, pretrain
from .rows import csr_rows_at
from .svd import checked_rank, truncated_svd

__all__ = ["Recommendations", "Recommender"]

Ids: TypeAlias = "Tensor | np.ndarray[Any, Any] | list[int]"
# Scores of so many bytes exist at a time.
_BLOCK_BYTES = 1 << 26


class Recommendations(NamedTuple):
    """Item ids and their scores, ``[users, k]``, best first; −1 and −inf where a user has fewer items left."""

    items: Tensor
    scores: Tensor


class Recommender:
    """Top-k recommendation, and scores, from a linear :class:`Bottleneck` on a sparse matrix.

    The matrix ``[users, items]`` stays sparse in training; in answering, scores of all items exist for a block of users
    at a time. Users and items go by their ids.

    Args:
        rank: size of the code.
        tied: the decoder is the encoder's transpose.
        user_power, item_power: a and b of the formula above: 0 takes counts as they are, ½ normalises rows and columns.
        shrinkage: λ, as a multiple of the least energy of a direction of the code; 0 does not shrink.

    Attributes:
        layer: the trained bottleneck, item scale and shrinkage in its weights, without biases: it takes rows of X.
        interactions: X, CSR.
        user_ids, item_ids: ids of rows and columns, ascending.
    """

    layer: Bottleneck
    interactions: Tensor
    user_ids: Tensor
    item_ids: Tensor

    def __init__(
        self,
        rank: int = 64,
        *,
        tied: bool = False,
        user_power: float = 0.25,
        item_power: float = 0.25,
        shrinkage: float = 1.0,
    ) -> None:
        for name, value in (("user_power", user_power), ("item_power", item_power), ("shrinkage", shrinkage)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number ≥ 0, got {value!r}")
        self.rank, self.tied = rank, tied
        self.user_power, self.item_power, self.shrinkage = user_power, item_power, shrinkage

    def fit(
        self, users: Ids, items: Ids, values: Tensor | None = None, *, method: str = "exact", **options: Any
    ) -> PretrainResult:
        """Train on interactions; those of the same user and item are added up.

        Args:
            users, items: ids, ``[n]``, integers.
            values: ``[n]``; None means 1 each.
            method: ``"exact"``, the truncated SVD of the sparse matrix (:func:`byol_fast.truncated_svd`), which takes
                no options; or ``"joint"`` or ``"alternate"`` of :func:`byol_fast.pretrain`.
            options: of ``pretrain``.

        Raises:
            TypeError, ValueError: sizes or dtypes do not fit; the message names the argument.
        """
        users, items = _checked_ids("users", users), _checked_ids("items", items)
        values = torch.ones(len(users)) if values is None else torch.as_tensor(values).float()
        if not len(users) == len(items) == len(values) > 0:
            raise ValueError(
                "users, items, values: expected the same number n ≥ 1 of each, "
                f"got {len(users)}, {len(items)} and {len(values)}"
            )
        self.user_ids, self.item_ids, self.interactions = _matrix(users, items, values)
        shape = self.interactions.shape
        rank = checked_rank(self.rank, min(shape), "min(users, items)")
        user_scale, item_scale = self._scales()
        scaled = _with_values(self.interactions, _scaled(self.interactions, user_scale, item_scale))
        layer = Bottleneck(shape[1], rank, bias=False, tied=self.tied)
        result = (
            _solve(layer, scaled, options) if method == "exact" else pretrain(layer, scaled, method=method, **options)
        )
        self.layer = self._in_scale_of_items(layer, scaled, item_scale)
        return result

    def recommend(self, users: Ids, k: int, *, exclude_seen: bool = True) -> Recommendations:
        """The ``k`` items of highest score for each of these users.

        Args:
            users: ids, ``[n]``, of users that were trained on.
            k: how many, from 1 to the number of items.
            exclude_seen: leave out items that the user has interacted with.

        Raises:
            ValueError: a user is unknown, or ``k`` out of range.
        """
        if not isinstance(k, int) or not 1 <= k <= len(self.item_ids):
            raise ValueError(f"k: expected an integer, 1 ≤ k ≤ items = {len(self.item_ids)}, got {k!r}")
        blocks = [self._top(rows, k, exclude_seen) for rows in self._blocks(_found("users", users, self.user_ids))]
        if not blocks:
            return Recommendations(torch.empty(0, k, dtype=torch.int64), torch.zeros(0, k))
        return Recommendations(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))

    @torch.no_grad()
    def predict(self, users: Ids, items: Ids) -> Tensor:
        """Scores of pairs, ``[n]``: what the bottleneck reconstructs at (user, item).

        Raises:
            ValueError: a user or item is unknown, or their numbers differ.
        """
        rows, columns = _found("users", users, self.user_ids), _found("items", items, self.item_ids)
        if len(rows) != len(columns):
            raise ValueError(f"items: expected as many as users, {len(rows)}, got {len(columns)}")
        known, which = rows.unique(return_inverse=True)
        codes = torch.cat([self._codes(block) for block in self._blocks(known)])
        return (codes[which] * self.layer.decoder.weight[columns]).sum(dim=1)

    @torch.no_grad()
    def _top(self, rows: Tensor, k: int, exclude_seen: bool) -> tuple[Tensor, Tensor]:
        scores = self.layer.decode(self._codes(rows))
        if exclude_seen:
            seen = csr_rows_at(self.interactions, rows)
            counts = seen.crow_indices().diff()
            scores[torch.arange(len(rows)).repeat_interleave(counts), seen.col_indices()] = -torch.inf
        best, columns = scores.topk(k, dim=1)
        return torch.where(best == -torch.inf, -1, self.item_ids[columns]), best

    def _blocks(self, rows: Tensor) -> Iterator[Tensor]:
        return iter(rows.split(max(1, _BLOCK_BYTES // (4 * len(self.item_ids))))) if len(rows) else iter(())

    def _codes(self, rows: Tensor) -> Tensor:
        return csr_rows_at(self.interactions, rows) @ self.layer.encoder.weight.t()

    def _scales(self) -> tuple[Tensor, Tensor]:
        """diag(n_u)^-a and diag(n_i)^-b."""
        per_user = self.interactions.crow_indices().diff()
        per_item = self.interactions.col_indices().bincount(minlength=self.interactions.shape[1])
        return per_user.float() ** -self.user_power, per_item.float() ** -self.item_power

    @torch.no_grad()
    def _in_scale_of_items(self, layer: Bottleneck, scaled: Tensor, item_scale: Tensor) -> Bottleneck:
        encoder, _, decoder, _ = layer.factors("recommender")
        basis, triangular = torch.linalg.qr(decoder)
        encoder = triangular @ encoder
        code = (scaled @ encoder.t().float()).double()
        energy, axes = torch.linalg.eigh(code.T @ code)
        noise = self.shrinkage * energy[0].clamp(min=0)
        kept = torch.where(energy > 0, energy / (energy + noise), 0.0)
        encoder, decoder = kept[:, None] * (axes.T @ encoder), basis @ axes
        folded = Bottleneck(layer.in_features, layer.rank, bias=False)
        return folded.assign_(encoder * item_scale, decoder / item_scale[:, None], None, None)


@torch.no_grad()
def _solve(layer: Bottleneck, matrix: Tensor, options: dict[str, Any]) -> PretrainResult:
    """Set the layer to its optimum, the right singular vectors, for which nothing of items × items is made."""
    if options:
        raise TypeError(f'options: expected none with method "exact", got {", ".join(options)}')
    begin = time.perf_counter()
    # Where it is randomized: closer to the smallest loss than its defaults, since nothing comes after to mend it.
    factors = truncated_svd(matrix, layer.rank, oversampling=32)
    layer.assign_(factors.Vh, factors.Vh.T, None, None)
    energy = float(torch.linalg.vector_norm(matrix.values(), dtype=torch.float64)) ** 2
    loss = factors.error**2 * energy / (matrix.shape[0] * matrix.shape[1])
    row = {"epoch": 1, "loss": loss, "seconds": time.perf_counter() - begin}
    return PretrainResult(layer, "exact", [row])


def _checked_ids(name: str, ids: Ids) -> Tensor:
    # An empty list says nothing about its numbers.
    tensor = torch.as_tensor(ids, dtype=None if len(ids) else torch.int64)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer ids of shape [n], got {tensor.dtype} of shape {list(tensor.shape)}")
    return tensor.long()


def _found(name: str, ids: Ids, known: Tensor) -> Tensor:
    """Places of these ids among the known ones, which are ascending."""
    wanted = _checked_ids(name, ids)
    places = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    unknown = known[places] != wanted
    if bool(unknown.any()):
        raise ValueError(f"{name}: expected ids that were trained on, got {int(wanted[unknown][0])}")
    return places


def _matrix(users: Tensor, items: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of rows and of columns, and the CSR matrix, by one number for each place, which keeps sorting small."""
    user_ids, rows = users.unique(return_inverse=True)
    item_ids, columns = items.unique(return_inverse=True)
    shape = (len(user_ids), len(item_ids))
    places, which = (rows * shape[1] + columns).unique(return_inverse=True)
    sums = values.new_zeros(len(places)).index_add_(0, which, values)
    pointers = torch.cat((rows.new_zeros(1), (places // shape[1]).bincount(minlength=shape[0]).cumsum(0)))
    matrix = torch.sparse_csr_tensor(pointers, places % shape[1], sums, size=shape, check_invariants=False)
    return user_ids, item_ids, matrix


def _scaled(matrix: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    """Its stored values, scaled."""
    by_row = row_scale.repeat_interleave(matrix.crow_indices().diff())
    return matrix.values() * by_row * column_scale[matrix.col_indices()]


def _with_values(matrix: Tensor, values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(
        matrix.crow_indices(), matrix.col_indices(), values, size=matrix.shape, check_invariants=False
    )
