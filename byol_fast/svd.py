"""Truncated singular value decomposition of a matrix in memory, of a sparse one, or of one on disk.

* ``exact``: LAPACK on the whole matrix, then cut. Needs the dense matrix in memory.
* ``covariance``: eigenvectors of the Gram matrix of the shorter side, added up in float64. Singular values below about
  1e-8 of the largest drown in its rounding, which is finer than float32 data resolves.
* ``randomized``: a Gaussian range finder with power iterations (Halko, Martinsson and Tropp, SIAM Review 53, 2011,
  algorithms 4.4 and 5.1); near-optimal, and cheap when the rank is small.

The last two read the matrix in blocks of rows and form nothing larger than their factors and the Gram matrix.
"""

from __future__ import annotations

import operator
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .rows import Matrix, RowMatrix, first_row_not_finite

__all__ = ["TruncatedSVD", "choose_method", "truncated_svd"]

_METHODS = ("auto", "exact", "covariance", "randomized")
_BLOCK_BYTES = 1 << 26


class _Factors(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class TruncatedSVD(_Factors):
    """``matrix ≈ U @ diag(S) @ Vh``: U ``[m, rank]``, S ``[rank]`` descending, Vh ``[rank, n]``.

    Attributes:
        method: the method that was used.
        error: ‖matrix − U diag(S) Vh‖ / ‖matrix‖ in the Frobenius norm. It follows from ‖matrix‖² − ΣS², so what is
            below the square root of the machine epsilon is rounding.
    """

    method: str
    error: float


@torch.no_grad()
def truncated_svd(
    matrix: Matrix,
    rank: SupportsIndex,
    *,
    method: str = "auto",
    oversampling: int = 16,
    power_iterations: int = 4,
    seed: int = 0,
) -> TruncatedSVD:
    """The ``rank`` largest singular values of a matrix and their vectors: its best approximation of that rank.

    Each row of Vh has its largest entry positive, so the signs do not depend on the method. Not differentiable.

    Args:
        matrix: ``[m, n]``, real numbers: a tensor, a NumPy array (memory-mapped or not), or a sparse CSR matrix
            (torch's or SciPy's).
        rank: how many singular triplets, from 1 to min(m, n).
        method: ``"exact"``, ``"covariance"``, ``"randomized"``, or ``"auto"``: see :func:`choose_method`.
        oversampling: extra columns of the range finder (``"randomized"`` only).
        power_iterations: how often its spectrum is sharpened, at two passes over the matrix each (``"randomized"``).
        seed: of its random start; the same seed gives the same result.

    Returns:
        The named tuple ``(U, S, Vh)`` with the attributes ``method`` and ``error``, on the matrix's device, in float64
        for float64 and wide integers, else float32.

    Raises:
        TypeError: ``matrix`` is something else, or ``rank`` no integer.
        ValueError: ``matrix`` is not 2-D or holds NaN or Inf, ``rank`` does not fit, or ``method`` is unknown.
    """
    source = _Blocks(RowMatrix.of(matrix, "matrix"))
    if 0 in source.shape:
        raise ValueError(f"matrix: expected shape [m, n] with m, n ≥ 1, got {list(source.shape)}")
    rank = checked_rank(rank, min(source.shape), "min(m, n)")
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    energy = source.energy()
    if method == "auto":
        method = choose_method(*source.shape, rank, source.dtype, source.rows.sparse)
    if method == "exact":
        factors = _exact(source, rank)
    elif method == "covariance":
        factors = _covariance(source, rank)
    else:
        factors = _randomized(source, rank, oversampling, power_iterations, seed)
    return _finished(factors, method, energy)


def choose_method(rows: int, columns: int, rank: int, dtype: torch.dtype, sparse: bool = False) -> str:
    """What ``method="auto"`` means for a matrix of this size: the cheapest method that keeps the dtype's accuracy.

    * randomized, if the rank is at most a tenth of the shorter side and that side exceeds 1000 or the matrix is sparse
      (its passes cost what is stored, a Gram matrix what is not), or if the side exceeds 4096;
    * else covariance for float32, whose small singular values it resolves as well as LAPACK does, and for matrices of
      more than 2²⁶ numbers;
    * else exact.
    """
    short = min(rows, columns)
    if short > 4096 or ((short > 1000 or sparse) and 10 * rank <= short):
        return "randomized"
    return "exact" if dtype == torch.float64 and rows * columns <= 1 << 26 else "covariance"


def checked_rank(rank: SupportsIndex, limit: int, symbol: str) -> int:
    """``rank`` as an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it is not in 1 … limit.
    """
    try:
        value = operator.index(rank)
    except TypeError:
        raise TypeError(f"rank: expected an integer, got {type(rank).__name__}") from None
    if not 1 <= value <= limit:
        raise ValueError(f"rank: expected 1 ≤ rank ≤ {symbol} = {limit}, got {value}")
    return value


def fixed_signs(rows: Tensor) -> Tensor:
    """Per row, the sign that makes its largest entry positive: ``[rows]`` of ±1."""
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


class _Blocks:
    """The products a decomposition needs, over blocks of rows."""

    def __init__(self, rows: RowMatrix) -> None:
        self.rows = rows
        self.shape = rows.shape
        self.dtype = rows.dtype
        self.device = rows.device
        # Sparse matrices are in memory and multiply best as a whole.
        self.size = max(rows.shape[0] if rows.sparse else _BLOCK_BYTES // (8 * max(rows.shape[1], 1)), 1)

    @property
    def transposed(self) -> _Blocks:
        return _Blocks(self.rows.transposed())

    def energy(self) -> float:
        """‖matrix‖², having seen that all of it is finite."""
        total = 0.0
        for start, block in self.rows.blocks(self.size):
            bad = first_row_not_finite(block)
            if bad is not None:
                raise ValueError(f"matrix: expected finite numbers, got NaN or Inf in row {start + bad}")
            values = block.values() if self.rows.sparse else block
            total += float(torch.linalg.vector_norm(values.to(self.dtype), dtype=torch.float64)) ** 2
        return total

    def dense(self) -> Tensor:
        block = self.rows.block(0, self.shape[0])
        return (block.to_dense() if self.rows.sparse else block).to(self.dtype)

    def times(self, right: Tensor) -> Tensor:
        """``matrix @ right``."""
        product = right.new_empty(self.shape[0], right.shape[1])
        for start, block in self.rows.blocks(self.size):
            product[start : start + block.shape[0]] = block.to(right.dtype) @ right
        return product

    def transposed_times(self, left: Tensor) -> Tensor:
        """``matrix.T @ left``."""
        product = left.new_zeros(self.shape[1], left.shape[1], dtype=torch.float64)
        for start, block in self.rows.blocks(self.size):
            product += block.to(left.dtype).t() @ left[start : start + block.shape[0]]
        return product.to(left.dtype)

    def gram(self) -> Tensor:
        """``matrix.T @ matrix`` in float64."""
        columns = self.shape[1]
        product = torch.zeros(columns, columns, dtype=torch.float64, device=self.device)
        for _, block in self.rows.blocks(self.size):
            exact = block.double()
            if self.rows.sparse:
                product += torch.sparse.mm(exact.t().to_sparse_csr(), exact).to_dense()
            else:
                product.addmm_(exact.T, exact)
        return product


def _exact(matrix: _Blocks, rank: int) -> _Factors:
    left, values, right = torch.linalg.svd(matrix.dense(), full_matrices=False)
    return _Factors(left[:, :rank], values[:rank], right[:rank])


def _covariance(matrix: _Blocks, rank: int) -> _Factors:
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = _covariance(matrix.transposed, rank)
        return _Factors(right.T, values, left.T)
    _, vectors = torch.linalg.eigh(matrix.gram())
    factors = _project(matrix, vectors[:, -rank:].flip(1))
    return _Factors(*(factor.to(matrix.dtype) for factor in factors))


def _project(matrix: _Blocks, basis: Tensor) -> _Factors:
    """SVD of ``matrix @ basis @ basis.T``. Its QR step keeps U orthonormal where singular values vanish."""
    orthonormal, triangular = torch.linalg.qr(matrix.times(basis))
    left, values, right = torch.linalg.svd(triangular)
    return _Factors(orthonormal @ left, values, right @ basis.T)


def _randomized(matrix: _Blocks, rank: int, oversampling: int, power_iterations: int, seed: int) -> _Factors:
    width = min(rank + oversampling, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    # An orthonormal basis after every product: without it, the powers would lose all but the largest directions.
    codomain, _ = torch.linalg.qr(matrix.times(start))
    for _ in range(power_iterations):
        domain, _ = torch.linalg.qr(matrix.transposed_times(codomain))
        codomain, _ = torch.linalg.qr(matrix.times(domain))
    domain, _ = torch.linalg.qr(matrix.transposed_times(codomain))
    left, values, right = _project(matrix, domain)
    return _Factors(left[:, :rank], values[:rank], right[:rank])


def _finished(factors: _Factors, method: str, energy: float) -> TruncatedSVD:
    left, values, right = factors
    signs = fixed_signs(right)
    result = TruncatedSVD(left * signs, values, right * signs[:, None])
    result.method = method
    missing = max(energy - float(values.double().square().sum()), 0.0)
    result.error = (missing / energy) ** 0.5 if energy else 0.0
    return result
