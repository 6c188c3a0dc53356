"""The largest eigenvalues of a symmetric matrix and their vectors, where only few of many are wanted.

Block Lanczos with full reorthogonalization (Golub and Underwood, Mathematical Software III, 1977): the Rayleigh-Ritz
method on the span of X, A X, A² X, … for a few random columns X. Where it may fail, it does not matter how: what it
finds is proved before it is returned.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_eigenpairs"]

# Columns of a block: more make better use of the processor, fewer reach further with as many products.
_BLOCK = 8
# Relative to the largest eigenvalue: how far what is returned may be from an eigenpair.
_TOLERANCE = 1e-12
# Further from it at the first look, the second one would not find it either.
_HOPELESS = 1e-4
# Up to this share of all dimensions, the subspace costs less than the whole decomposition.
_WORTHWHILE = 1 / 3


def leading_eigenpairs(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The ``rank`` largest eigenvalues, descending, and their vectors as columns, to 1e-12 of the largest eigenvalue.

    None where the whole decomposition has to do: the rank is not small beside D, eigenvalues lie too close together to
    be told apart soon, more of them are equal than a block has columns, the rank of the matrix is low, or it is not on
    a CPU.

    Args:
        matrix: symmetric and positive semi-definite, ``[D, D]``, float64.
        rank: how many.
    """
    first, last = (_whole_blocks(size) for size in (128 + 2 * rank, 160 + 2.5 * rank))
    # On a GPU, nobody has measured whether this is faster.
    if first > _WORTHWHILE * len(matrix) or matrix.device.type != "cpu":
        return None
    lanczos = _Lanczos(matrix, last)
    for size in (first, last):
        lanczos.extend(size)
        values, vectors = lanczos.ritz_pairs(rank)
        error = torch.linalg.matrix_norm(matrix @ vectors - vectors * values)
        if bool(error <= _TOLERANCE * values[0]):
            return (values, vectors) if _are_leading(matrix, values, vectors) else None
        if not bool(error <= _HOPELESS * values[0]):
            return None
    return None


def _whole_blocks(size: float) -> int:
    return -int(-size // _BLOCK) * _BLOCK


class _Lanczos:
    """An orthonormal basis of X, A X, A² X, …, in rows, and A projected onto it."""

    def __init__(self, matrix: Tensor, limit: int) -> None:
        self.matrix = matrix
        self.size = 0
        self.basis = matrix.new_empty(limit + _BLOCK, len(matrix))
        self.projected = matrix.new_zeros(limit, limit)
        start = torch.randn(_BLOCK, len(matrix), generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
        self.basis[:_BLOCK] = _orthonormal(start)

    def extend(self, size: int) -> None:
        """Grow the basis to this many rows."""
        while self.size < size:
            start, self.size = self.size, self.size + _BLOCK
            known = self.basis[: self.size]
            image = known[start:] @ self.matrix
            # In exact arithmetic, all that the image shares with the basis is in its last two blocks.
            near = slice(max(0, start - _BLOCK), self.size)
            part = image @ self.basis[near].T
            self.projected[start : self.size, near] = part
            image -= part @ self.basis[near]
            # What rounding left in any of them, which would grow from step to step.
            image -= (image @ known.T) @ known
            self.basis[self.size : self.size + _BLOCK] = _orthonormal(image)

    def ritz_pairs(self, rank: int) -> tuple[Tensor, Tensor]:
        """The ``rank`` largest eigenvalues of the projection, descending, and what its eigenvectors are in full."""
        values, axes = torch.linalg.eigh(self.projected[: self.size, : self.size])
        return values[-rank:].flip(0), self.basis[: self.size].T @ axes[:, -rank:].flip(1)


def _orthonormal(rows: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(rows.T)[0]
    return columns.T


def _are_leading(matrix: Tensor, values: Tensor, vectors: Tensor) -> bool:
    """Whether these pairs, whose residuals are small, are different ones, and none larger is missing."""
    gram = vectors.T @ vectors
    gram.diagonal().sub_(1)
    if not bool(torch.linalg.matrix_norm(gram) <= _TOLERANCE):
        return False
    # Positive definite, and so decomposable, if and only if what is left has only eigenvalues below the limit.
    rest = (vectors * values) @ vectors.T - matrix
    rest.diagonal().add_(values[-1] + 4 * _TOLERANCE * values[0])
    return int(torch.linalg.cholesky_ex(rest)[1]) == 0
