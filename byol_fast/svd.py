"""Truncated singular value decomposition.

Three methods, all without ever forming more than the factors:

* ``exact``: LAPACK on the whole matrix, then cut.
* ``covariance``: eigenvectors of the Gram matrix of the shorter side, formed in float64. Singular values below about
  1e-8 of the largest drown in its rounding, which is finer than float32 data resolves.
* ``randomized``: a Gaussian range finder with power iterations (Halko, Martinsson and Tropp, SIAM Review 53, 2011,
  algorithms 4.4 and 5.1); near-optimal, and cheap when the rank is small.
"""

from __future__ import annotations

import operator
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

__all__ = ["TruncatedSVD", "truncated_svd"]

_METHODS = ("auto", "exact", "covariance", "randomized")


class TruncatedSVD(NamedTuple):
    """``matrix ≈ U @ diag(S) @ Vh``: U ``[m, rank]``, S ``[rank]`` descending, Vh ``[rank, n]``."""

    U: Tensor
    S: Tensor
    Vh: Tensor


@torch.no_grad()
def truncated_svd(
    matrix: Tensor,
    rank: int,
    *,
    method: str = "auto",
    oversampling: int = 16,
    power_iterations: int = 4,
    seed: int = 0,
) -> TruncatedSVD:
    """The ``rank`` largest singular values of a matrix and their vectors: its best approximation of that rank.

    Each row of Vh has its largest entry positive, so the signs do not depend on the method. Not differentiable.

    Args:
        matrix: ``[m, n]``, floating-point.
        rank: how many singular triplets, from 1 to min(m, n).
        method: ``"exact"``, ``"covariance"``, ``"randomized"``, or ``"auto"``: see :func:`choose_method`.
        oversampling: extra columns of the range finder (``"randomized"`` only).
        power_iterations: passes that sharpen the range finder's spectrum (``"randomized"`` only).
        seed: of the range finder's random start; the same seed gives the same result.

    Returns:
        The named tuple ``(U, S, Vh)``, on the matrix's device, in its dtype (float32 for half precision).

    Raises:
        TypeError: ``matrix`` is no dense floating-point tensor, or ``rank`` no integer.
        ValueError: ``matrix`` is not 2-D or holds NaN or Inf, ``rank`` does not fit, or ``method`` is unknown.
    """
    matrix = _checked_matrix(matrix)
    rank = checked_rank(rank, min(matrix.shape), "min(m, n)")
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    if method == "auto":
        method = choose_method(matrix.shape[0], matrix.shape[1], rank, matrix.dtype)
    if method == "exact":
        factors = _exact(matrix, rank)
    elif method == "covariance":
        factors = _covariance(matrix, rank)
    else:
        factors = _randomized(matrix, rank, oversampling, power_iterations, seed)
    return _with_fixed_signs(*factors)


def choose_method(rows: int, columns: int, rank: int, dtype: torch.dtype) -> str:
    """What ``method="auto"`` means for a matrix of this size: the cheapest method that keeps the dtype's accuracy.

    * randomized, when the rank is at most a tenth of the shorter side and that side exceeds 1000;
    * else covariance for float32, whose small singular values it resolves as well as LAPACK does;
    * else exact.
    """
    short = min(rows, columns)
    if short > 1000 and 10 * rank <= short:
        return "randomized"
    return "exact" if dtype == torch.float64 else "covariance"


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


def _checked_matrix(matrix: Tensor) -> Tensor:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix: expected a torch.Tensor, got {type(matrix).__name__}")
    if matrix.layout != torch.strided or not matrix.is_floating_point():
        raise TypeError(f"matrix: expected a dense floating-point tensor, got {matrix.dtype}, {matrix.layout}")
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"matrix: expected shape [m, n] with m, n ≥ 1, got {list(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        row = int(torch.isfinite(matrix).all(dim=1).logical_not().nonzero()[0])
        raise ValueError(f"matrix: expected finite numbers, got NaN or Inf in row {row}")
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()


def _exact(matrix: Tensor, rank: int) -> TruncatedSVD:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return TruncatedSVD(left[:, :rank], values[:rank], right[:rank])


def _covariance(matrix: Tensor, rank: int) -> TruncatedSVD:
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = _covariance(matrix.T, rank)
        return TruncatedSVD(right.T, values, left.T)
    exact = matrix.double()
    _, vectors = torch.linalg.eigh(exact.T @ exact)
    factors = _project(exact, vectors[:, -rank:].flip(1))
    return TruncatedSVD(*(factor.to(matrix.dtype) for factor in factors))


def _project(matrix: Tensor, basis: Tensor) -> TruncatedSVD:
    """SVD of ``matrix @ basis @ basis.T``. Its QR step keeps U orthonormal where singular values vanish."""
    orthonormal, triangular = torch.linalg.qr(matrix @ basis)
    left, values, right = torch.linalg.svd(triangular)
    return TruncatedSVD(orthonormal @ left, values, right @ basis.T)


def _randomized(matrix: Tensor, rank: int, oversampling: int, power_iterations: int, seed: int) -> TruncatedSVD:
    width = min(rank + oversampling, *matrix.shape)
    generator = torch.Generator(matrix.device).manual_seed(seed)
    basis = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype, device=matrix.device)
    # An orthonormal basis after every product: without it, the powers would lose all but the largest directions.
    basis, _ = torch.linalg.qr(matrix.T @ (matrix @ basis))
    for _ in range(power_iterations):
        basis, _ = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis)[0])
    left, values, right = _project(matrix, basis)
    return TruncatedSVD(left[:, :rank], values[:rank], right[:rank])


def _with_fixed_signs(left: Tensor, values: Tensor, right: Tensor) -> TruncatedSVD:
    signs = fixed_signs(right)
    return TruncatedSVD(left * signs, values, right * signs[:, None])
