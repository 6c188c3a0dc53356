"""Second moments of rows, added up block by block: what every kind of PCA here is computed from.

The quantity is the scatter ``S = Σ (x − mean)(x − mean)ᵀ``, or its image ``S Ω`` under a test matrix Ω of a few columns
where S itself would be too large. Both are linear in S, so one code updates both::

    blocks a, b with means μ and counts n:    S = S_a + S_b + n_a n_b / (n_a + n_b) · δ δᵀ,    δ = μ_b − μ_a

(Chan, Golub and LeVeque, Computing 28, 1982.) Each block is shifted to about its own mean before it is multiplied, so
large means cost no digits; products are made in the dtype of the rows, sums of blocks in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from .backends import scatter_kernel
from .eigen import leading_eigenpairs
from .rows import first_row_not_finite

__all__ = ["Moments", "Scatter", "Sketch", "Spectrum"]

_Self = TypeVar("_Self", bound="Moments")
# Columns of the panels that make up the triangle of a product: narrower saves work, wider saves overhead.
_PANEL = 128
# Rows after which PyTorch's float32 sums start anew.
_SUM_ROWS = 4096
# The mean of this many rows of a block is near enough to the mean of all.
_SHIFT_ROWS = 256


class Spectrum(NamedTuple):
    """Eigenvalues of a scatter ``[r]``, descending and ≥ 0, its axes ``[D, r]``, and the sum of all D eigenvalues."""

    values: Tensor
    axes: Tensor
    total: float


def _point_among(rows: Tensor) -> Tensor:
    """A point to shift rows by; any will do that is not many standard deviations from the mean."""
    return rows[:: max(1, len(rows) // _SHIFT_ROWS)].mean(dim=0)


class Moments(ABC):
    """Count, mean ``[D]``, and image of the scatter ``[D, l]``, in float64."""

    def __init__(self, features: int, width: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self.image = torch.zeros(features, width, dtype=torch.float64, device=device)
        # Machine epsilon of the coarsest rows so far, which bounds what can be told from zero.
        self.resolution = torch.finfo(torch.float64).eps

    @abstractmethod
    def empty(self: _Self) -> _Self:
        """Moments of the same kind, of no rows."""

    @abstractmethod
    def sums(self) -> tuple[Tensor, ...]:
        """What adds up where moments about one mean are added."""

    @abstractmethod
    def _add_shifted(self, rows: Tensor, shift: Tensor, workspace: Tensor) -> Tensor:
        """Add ``Σ (x − shift)(x − shift)ᵀ``, made in the dtype of the rows; ``Σ (x − shift)``, in float64."""

    @abstractmethod
    def _add_sparse_product(self, rows: Tensor) -> None:
        """Add ``rowsᵀ rows`` of a CSR matrix in float64."""

    @abstractmethod
    def _add_outer(self, vector: Tensor, weight: float) -> None:
        """Add ``weight · vector vectorᵀ``."""

    @abstractmethod
    def _eigen(self) -> Spectrum:
        """The spectrum, not yet cleared of what rounding adds."""

    def _leading(self, rank: int) -> Spectrum | None:
        """As much of it as ``rank`` wants; None where that would take as long as all of it."""
        return None

    def add_(self, rows: Tensor, workspace: Tensor) -> None:
        """Add finite dense rows; ``workspace``, of their shape and dtype, may be ``rows`` and is overwritten."""
        shift = _point_among(rows)
        self._settle(rows.dtype, len(rows), shift, self._add_shifted(rows, shift, workspace))

    def add_finite_(self, rows: Tensor, workspace: Tensor) -> int:
        """As :meth:`add_`, of rows that may not be finite; returns how many were added.

        All, or, if one of them holds NaN or Inf, some of those before it.
        """
        if first_row_not_finite(rows) is not None:
            return 0
        self.add_(rows, workspace)
        return len(rows)

    def _settle(self, dtype: torch.dtype, count: int, shift: Tensor, total: Tensor) -> None:
        """Count rows whose scatter about ``shift`` has been added; ``total``: the sum of what they are beside it.

        What the shift is beside the mean is taken out.
        """
        rest = total / count
        self._add_outer(rest, -count)
        self._count(count, shift.double() + rest)
        self.resolution = max(self.resolution, torch.finfo(dtype).eps)

    def add_sparse_(self, rows: Tensor) -> None:
        """Add a block of CSR rows. In float64 throughout, because zeros cannot be shifted by a mean."""
        rows = rows.double()
        mean = torch.zeros_like(self.mean).index_add_(0, rows.col_indices(), rows.values()) / rows.shape[0]
        self._add_sparse_product(rows)
        self._add_outer(mean, -rows.shape[0])
        self._count(rows.shape[0], mean)

    def merge_(self: _Self, other: _Self) -> None:
        """Add the rows that ``other`` has seen."""
        if other.count == 0:
            return
        for mine, theirs in zip(self.sums(), other.sums(), strict=True):
            mine.add_(theirs.to(mine.device))
        self._count(other.count, other.mean.to(self.mean.device))
        self.resolution = max(self.resolution, other.resolution)

    def _count(self, count: int, mean: Tensor) -> None:
        """Count rows with this mean, whose scatter about it has been added."""
        total = self.count + count
        difference = mean - self.mean
        self._add_outer(difference, self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total

    def all_reduce_(self, group: Any = None) -> None:
        """Add up the moments of all processes, in each of them."""
        count = torch.tensor([self.count], dtype=torch.int64, device=self.mean.device)
        resolution = torch.tensor([self.resolution], dtype=torch.float64, device=self.mean.device)
        mean = self.mean * self.count
        distributed.all_reduce(count, group=group)
        distributed.all_reduce(resolution, op=distributed.ReduceOp.MAX, group=group)
        distributed.all_reduce(mean, group=group)
        mean /= count.clamp(min=1)
        # About the common mean, the scatters simply add up.
        self._add_outer(self.mean - mean, self.count)
        for tensor in self.sums():
            distributed.all_reduce(tensor, group=group)
        self.count, self.mean, self.resolution = int(count), mean, float(resolution)

    def copy(self: _Self) -> _Self:
        other = self.empty()
        other.merge_(self)
        return other

    def spectrum(self, centered: bool = True) -> Spectrum:
        """Eigenvalues and axes of the scatter, or, not centred, of ``Σ x xᵀ``."""
        return self._cleared(self._about(centered)._eigen(), centered)

    def leading(self, rank: int, centered: bool = True) -> Spectrum | None:
        """The first ``rank`` of them, where they are found without the others; else None."""
        found = self._about(centered)._leading(rank)
        return None if found is None else self._cleared(found, centered)

    def _about(self: _Self, centered: bool) -> _Self:
        """The moments about the mean, or about 0."""
        if centered:
            return self
        moments = self.copy()
        moments._add_outer(self.mean, self.count)
        return moments

    def _cleared(self, spectrum: Spectrum, centered: bool) -> Spectrum:
        values = spectrum.values.clamp(min=0)
        # n rows span n directions at most, n − 1 about their mean; what exceeds that is rounding.
        values[self.count - int(centered) :] = 0
        return spectrum._replace(values=values)

    def state(self) -> dict[str, Any]:
        """Everything seen so far, in tensors and numbers."""
        sums = {f"sum{index}": tensor.clone() for index, tensor in enumerate(self.sums())}
        return {"count": self.count, "mean": self.mean.clone(), "resolution": self.resolution, **sums}

    def load_state_(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self.count, self.resolution = state["count"], state["resolution"]
        self.mean.copy_(state["mean"])
        for index, tensor in enumerate(self.sums()):
            tensor.copy_(state[f"sum{index}"])


class Scatter(Moments):
    """The whole scatter ``[D, D]``: exact, all ranks at once."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, features, device)
        self._product = torch.empty(0, device=device)

    def empty(self) -> Scatter:
        return Scatter(len(self.mean), self.mean.device)

    def sums(self) -> tuple[Tensor, ...]:
        return (self.image,)

    def matrix(self) -> Tensor:
        """The scatter; of ``image``, only the upper triangle is kept up to date."""
        return self.image.triu() + self.image.triu(1).T

    def add_finite_(self, rows: Tensor, workspace: Tensor) -> int:
        scatter, shift = scatter_kernel(rows), _point_among(rows)
        # A point that is not finite would spoil rows that are.
        if scatter is None or not bool(torch.isfinite(shift).all()):
            return super().add_finite_(rows, workspace)
        # The kernel sees what is not finite while it packs the rows, which saves a pass over them.
        total, added = scatter(rows, shift, self.image)
        if added:
            self._settle(rows.dtype, added, shift, total)
        return added

    def _add_shifted(self, rows: Tensor, shift: Tensor, workspace: Tensor) -> Tensor:
        scatter = scatter_kernel(rows)
        if scatter is not None:
            return scatter(rows, shift, self.image)[0]
        rows = torch.sub(rows, shift, out=workspace)
        for part in rows.split(_SUM_ROWS):
            self._add_triangle(part)
        return rows.mean(dim=0).double() * len(rows)

    def _add_triangle(self, rows: Tensor) -> None:
        """Add ``rowsᵀ rows``; panels of the upper triangle take little more than half the work of the full product."""
        features = rows.shape[1]
        if self._product.dtype != rows.dtype or self._product.numel() == 0:
            self._product = torch.zeros(features, features, dtype=rows.dtype, device=rows.device)
        for start in range(0, features, _PANEL):
            stop = start + _PANEL
            torch.mm(rows[:, :stop].T, rows[:, start:stop], out=self._product[:stop, start:stop])
        self.image += self._product

    def _add_sparse_product(self, rows: Tensor) -> None:
        self.image += torch.sparse.mm(rows.t().to_sparse_csr(), rows).to_dense()

    def _add_outer(self, vector: Tensor, weight: float) -> None:
        self.image.addr_(vector, vector, alpha=weight)

    def _eigen(self) -> Spectrum:
        values, axes = torch.linalg.eigh(self.image, UPLO="U")
        return Spectrum(values.flip(0), axes.flip(1), float(self.image.trace()))

    def _leading(self, rank: int) -> Spectrum | None:
        found = leading_eigenpairs(self.matrix(), rank)
        return None if found is None else Spectrum(*found, float(self.image.trace()))


class Sketch(Moments):
    """The image of the scatter under a few directions, from which its leading part follows by Nyström's formula.

    With Y = S Ω, ``S ≈ Y (Ωᵀ Y)⁻¹ Yᵀ``, which never exceeds S. (Tropp, Yurtsever, Udell and Cevher, NeurIPS 2017,
    algorithm 3, with its shift against rounding.)
    """

    def __init__(self, test: Tensor) -> None:
        super().__init__(test.shape[0], test.shape[1], test.device)
        self.test = test
        self.energy = torch.zeros((), dtype=torch.float64, device=test.device)

    @classmethod
    def random(cls, features: int, width: int, seed: int, device: torch.device) -> Sketch:
        """Start from random orthonormal directions, the same on every machine."""
        generator = torch.Generator().manual_seed(seed)
        test = torch.randn(features, width, generator=generator, dtype=torch.float64)
        return cls(torch.linalg.qr(test)[0].to(device))

    def empty(self) -> Sketch:
        return Sketch(self.test)

    def sums(self) -> tuple[Tensor, ...]:
        return self.image, self.energy

    def _add_shifted(self, rows: Tensor, shift: Tensor, workspace: Tensor) -> Tensor:
        rows = torch.sub(rows, shift, out=workspace)
        test = self.test.to(rows.dtype)
        for part in rows.split(_SUM_ROWS):
            self.image += part.T @ (part @ test)
        self.energy += torch.linalg.vector_norm(rows, dim=0).double().square().sum()
        return rows.mean(dim=0).double() * len(rows)

    def _add_sparse_product(self, rows: Tensor) -> None:
        self.image += rows.t() @ (rows @ self.test)
        self.energy += rows.values().square().sum()

    def _add_outer(self, vector: Tensor, weight: float) -> None:
        self.image.addr_(vector, self.test.T @ vector, alpha=weight)
        self.energy += weight * vector.square().sum()

    def _eigen(self) -> Spectrum:
        shift = self.resolution * torch.linalg.matrix_norm(self.image).clamp(min=torch.finfo(torch.float64).tiny)
        image = self.image + shift * self.test
        core = self.test.T @ image
        values, axes = torch.linalg.eigh((core + core.T) / 2)
        left, singular, _ = torch.linalg.svd((image @ axes) * values.maximum(shift).rsqrt(), full_matrices=False)
        return Spectrum(singular.square() - shift, left, float(self.energy))
