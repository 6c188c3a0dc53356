"""Rows of a matrix, wherever it lies: a tensor, a NumPy array, a memory-mapped file, a sparse CSR matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .data import FileMatrix

__all__ = ["Matrix", "RowMatrix", "csr_of", "csr_rows_at", "first_row_not_finite"]

# SciPy's sparse matrices are recognised by their ``tocsr``, without importing SciPy.
Matrix: TypeAlias = "Tensor | np.ndarray[Any, Any] | Any"

_FLOAT64_KINDS = {torch.float64, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64}


@dataclass(frozen=True)
class RowMatrix:
    """A matrix that is read in blocks of rows, so that it may be larger than memory.

    ``dtype`` is the one to compute in: float32, or float64 where float32 would not hold every value.
    """

    source: Any
    shape: tuple[int, int]
    dtype: torch.dtype
    sparse: bool

    @classmethod
    def of(cls, matrix: Matrix, name: str) -> RowMatrix:
        """See ``matrix`` as rows.

        Raises:
            TypeError: it is no tensor, NumPy array or CSR matrix of real numbers.
            ValueError: it does not have two dimensions.
        """
        matrix = csr_of(matrix)
        sparse = isinstance(matrix, Tensor) and matrix.layout == torch.sparse_csr
        if isinstance(matrix, np.ndarray):
            dtype = _torch_dtype(matrix, name)
        elif isinstance(matrix, FileMatrix) or (
            isinstance(matrix, Tensor) and (sparse or matrix.layout == torch.strided)
        ):
            dtype = matrix.dtype
        else:
            kind = str(matrix.layout) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"{name}: expected a tensor, a NumPy array or a sparse CSR matrix, got {kind}")
        if dtype.is_complex:
            raise TypeError(f"{name}: expected real numbers, got {dtype}")
        if len(matrix.shape) != 2:
            raise ValueError(f"{name}: expected two dimensions [rows, columns], got shape {list(matrix.shape)}")
        rows, columns = matrix.shape
        return cls(matrix, (rows, columns), torch.float64 if dtype in _FLOAT64_KINDS else torch.float32, sparse)

    @property
    def density(self) -> float:
        """Share of the entries that are stored."""
        if not self.sparse or 0 in self.shape:
            return 1.0
        return float(self.source._nnz()) / (self.shape[0] * self.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    def transposed(self) -> RowMatrix:
        """The same numbers with columns for rows."""
        source = self.source.tensor() if isinstance(self.source, FileMatrix) else self.source
        source = source.t().to_sparse_csr() if self.sparse else source.T
        return RowMatrix(source, self.shape[::-1], self.dtype, self.sparse)

    def block(self, start: int, stop: int) -> Tensor:
        """These rows, dense or CSR as they are; a dense block is a view where it can be, in whatever dtype it has."""
        if self.sparse:
            return _csr_rows(self.source, start, stop)
        if isinstance(self.source, Tensor | FileMatrix):
            return self.source[start:stop]
        rows = self.source[start:stop]
        # Torch shares neither foreign byte orders nor negative strides nor memory it must not write.
        if not (rows.dtype.isnative and rows.flags.writeable) or min(rows.strides) < 0:
            rows = np.array(rows, dtype=rows.dtype.newbyteorder("="))
        return torch.from_numpy(rows)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, ``size`` at a time: (index of the first row, block).

        A block may be overwritten by the next one.
        """
        rows, columns = self.shape
        in_file = isinstance(self.source, FileMatrix)
        # Fresh memory for every block of a file would cost more than reading it.
        buffer = torch.empty(min(size, rows), columns, dtype=self.source.dtype) if in_file else None
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            yield start, self.block(start, stop) if buffer is None else self.source.read(start, buffer[: stop - start])


def csr_of(matrix: Matrix) -> Matrix:
    """CSR for a sparse matrix, torch's or SciPy's; anything else as it is."""
    if hasattr(matrix, "tocsr"):
        return _csr_of_scipy(matrix)
    if isinstance(matrix, Tensor) and matrix.layout == torch.sparse_coo:
        return matrix.to_sparse_csr()
    return matrix


def csr_rows_at(matrix: Tensor, indices: Tensor) -> Tensor:
    """These rows of a CSR matrix, in this order, as a CSR matrix of their own."""
    indices = indices.to(matrix.device)
    starts, stops = matrix.crow_indices()[indices], matrix.crow_indices()[indices + 1]
    counts = stops - starts
    pointers = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    # Where each stored number was: its row's first place, and on from there.
    places = (starts - pointers[:-1]).repeat_interleave(counts) + torch.arange(int(pointers[-1]), device=matrix.device)
    return torch.sparse_csr_tensor(
        pointers,
        matrix.col_indices()[places],
        matrix.values()[places],
        size=(len(indices), matrix.shape[1]),
        check_invariants=False,
    )


def first_row_not_finite(block: Tensor) -> int | None:
    """Index of the first row that holds NaN or Inf, if any does."""
    values = block.values() if block.layout == torch.sparse_csr else block
    # Only finite numbers have a finite sum, and reading a block once is cheap. The sum may overflow, hence the look.
    if not values.is_floating_point() or bool(torch.isfinite(values.sum())):
        return None
    bad = torch.isfinite(values).logical_not()
    if block.layout != torch.sparse_csr:
        bad = bad.any(dim=1)
    if not bool(bad.any()):
        return None
    first = int(bad.nonzero()[0])
    if block.layout != torch.sparse_csr:
        return first
    return int(torch.searchsorted(block.crow_indices(), first, right=True)) - 1


def _torch_dtype(array: np.ndarray[Any, Any], name: str) -> torch.dtype:
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected real numbers, got {array.dtype}")
    return torch.from_numpy(np.empty(0, array.dtype.newbyteorder("="))).dtype


def _csr_of_scipy(matrix: Any) -> Tensor:
    matrix = matrix.tocsr()
    return torch.sparse_csr_tensor(
        torch.from_numpy(matrix.indptr.astype(np.int64)),
        torch.from_numpy(matrix.indices.astype(np.int64)),
        torch.from_numpy(np.array(matrix.data)),
        size=matrix.shape,
        check_invariants=False,
    )


def _csr_rows(matrix: Tensor, start: int, stop: int) -> Tensor:
    pointers = matrix.crow_indices()
    first, last = int(pointers[start]), int(pointers[stop])
    return torch.sparse_csr_tensor(
        pointers[start : stop + 1] - first,
        matrix.col_indices()[first:last],
        matrix.values()[first:last],
        size=(stop - start, matrix.shape[1]),
        check_invariants=False,
    )
