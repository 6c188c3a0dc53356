"""A matrix that passes by in blocks, with a bar and a speed."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor
from tqdm import tqdm

from ..data import FileMatrix

__all__ = ["Stream", "speed"]

_BLOCK_BYTES = 1 << 24


class Stream:
    """The rows of a matrix, in blocks of some megabytes; iterating shows a bar, where there is a terminal.

    ``passes`` and ``seconds`` count what has been read so far, and how long it took to read and to use.
    """

    def __init__(self, matrix: FileMatrix | Tensor, description: str) -> None:
        self.matrix = matrix
        self.passes = 0
        self.seconds = 0.0
        self._description = description
        self._rows = max(1, _BLOCK_BYTES // (matrix.shape[1] * matrix.dtype.itemsize))

    def __iter__(self) -> Iterator[Tensor]:
        begin = time.perf_counter()
        rows = len(self.matrix)
        with tqdm(total=rows, desc=self._description, unit="row", unit_scale=True, disable=None) as bar:
            for start in range(0, rows, self._rows):
                block = self.matrix[start : min(start + self._rows, rows)]
                yield block
                bar.update(len(block))
        self.passes += 1
        self.seconds += time.perf_counter() - begin

    def speed(self) -> str:
        """How fast it went."""
        return speed(self.matrix, self.passes, self.seconds)


def speed(matrix: FileMatrix | Tensor, passes: float, seconds: float) -> str:
    """``1,000 rows in 0.50 s: 2,000 rows/s, 0.8 MB/s``."""
    rows, size = len(matrix), len(matrix) * matrix.shape[1] * matrix.dtype.itemsize
    often = "" if passes == 1 else f" × {passes:,g}"
    rate = passes / max(seconds, 1e-9)
    return f"{rows:,} rows{often} in {seconds:.2f} s: {rows * rate:,.0f} rows/s, {size * rate / 1e6:,.1f} MB/s"
