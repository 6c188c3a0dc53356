"""Rows that lie one after the other in a file."""

from __future__ import annotations

import math
import mmap
import os
import sys
import weakref
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = ["FileMatrix"]

# Reserves no memory for pages that nobody writes: without it, a file larger than memory could not be mapped. Python
# names the flag from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class FileMatrix:
    """A matrix ``[N, D]`` of one dtype, row after row in a file, of which only what is asked for is in memory.

    ``matrix[start:stop]`` reads these rows into a new tensor, ``matrix[indices]`` gathers rows. It stands where this
    package takes a matrix or data: :class:`byol_fast.StreamingPCA`, :func:`byol_fast.truncated_svd`,
    :func:`byol_fast.pretrain`.

    Args:
        file: opened for reading in binary mode; the matrix keeps it open for itself.
        shape: ``[N, D]``.
        dtype: of the numbers, in the byte order of this machine.
        offset: bytes before the first row.

    Raises:
        ValueError: the file is too short.
    """

    def __init__(self, file: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = torch.device("cpu")
        self._name = file.name
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._offset = offset
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._tensor: Tensor | None = None
        size, needed = os.fstat(file.fileno()).st_size, offset + len(self) * self._row_bytes
        if size < needed:
            raise ValueError(f"expected at least {needed} bytes, found {size}")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def is_complex(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_complex

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if not isinstance(rows, slice):
            return self.tensor()[rows]
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self.tensor()[rows].clone()
        return self.read(start, torch.empty(max(stop - start, 0), *self.shape[1:], dtype=self.dtype))

    def read(self, start: int, block: Tensor) -> Tensor:
        """Fill the contiguous ``block`` with the rows from ``start`` on, and return it.

        Raises:
            OSError: the file has become shorter.
        """
        if not hasattr(os, "preadv"):
            return block.copy_(self.tensor()[start : start + len(block)])
        # Read, not mapped: the memory of the process then does not grow by all that it has ever looked at.
        view = bytes_of(block)
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], self._offset + start * self._row_bytes + done)
            if count == 0:
                raise OSError(f"{self._name}: expected {len(self)} rows, but the file has become shorter")
            done += count
        return block

    def tensor(self) -> Tensor:
        """All of it, memory-mapped. Writing to the tensor never writes to the file."""
        if self._tensor is None:
            numbers = math.prod(self.shape)
            if numbers == 0:
                return torch.empty(self.shape, dtype=self.dtype)
            flat = torch.frombuffer(mapped(self._descriptor), dtype=self.dtype, count=numbers, offset=self._offset)
            self._tensor = flat.view(self.shape)
        return self._tensor


def mapped(descriptor: int) -> mmap.mmap:
    """A whole file, copied page by page where it is written to."""
    if os.name != "posix":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)


def bytes_of(block: Tensor) -> memoryview:
    """The memory of a contiguous tensor. An empty one has none to look at."""
    array: Any = block.view(torch.uint8).numpy() if block.numel() else np.empty(0, np.uint8)
    return memoryview(array).cast("B")
