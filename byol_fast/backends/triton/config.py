"""Launch configurations, chosen by shape. Fixed, so that results are bit-equal on machines of one kind.

They follow from what the compiler says of registers, spills and shared memory (tests/triton/resources.json); they are
not timed yet. Blocks are powers of two and at least 16, which is the least a matrix product takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

# The largest rank of the fused kernels: beyond, their accumulators do not fit the registers.
MAX_RANK = 128


@dataclass(frozen=True)
class Launch:
    """Rows and columns of a tile, warps, stages of the software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """The launches of every kernel that multiplies matrices, for a width of the code and a kind of operand."""

    encode: Launch
    collect: Launch
    forward: Launch
    backward: Launch
    data: Launch


def padded_rank(rank: int) -> int:
    """The width of a tile of codes: the next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def config(rank: int, half: bool) -> Config:
    """The configuration for a rank ≤ MAX_RANK; ``half`` for operands of two bytes."""
    return _chosen.get() or _TABLE[half, padded_rank(rank)]


_chosen: ContextVar[Config | None] = ContextVar("configuration", default=None)


@contextmanager
def using(configuration: Config) -> Iterator[None]:
    """Launches take this configuration, whatever the table says."""
    token = _chosen.set(configuration)
    try:
        yield
    finally:
        _chosen.reset(token)


_TABLE = {
    (True, 16): Config(
        Launch(128, 64, 8, 3), Launch(64, 128, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 1)
    ),
    (True, 32): Config(
        Launch(128, 64, 8, 3), Launch(64, 128, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 1)
    ),
    (True, 64): Config(
        Launch(128, 64, 8, 3), Launch(64, 128, 8, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 1)
    ),
    (True, 128): Config(
        Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 32, 8, 1)
    ),
    # float32 is multiplied without the matrix unit, and unrolled: small tiles, or it spills.
    (False, 16): Config(
        Launch(64, 32, 4, 2), Launch(32, 32, 4, 2), Launch(64, 32, 4, 2), Launch(64, 32, 4, 2), Launch(64, 32, 4, 1)
    ),
    (False, 32): Config(
        Launch(64, 32, 8, 2), Launch(16, 32, 4, 2), Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(64, 32, 8, 1)
    ),
    (False, 64): Config(
        Launch(32, 32, 8, 2), Launch(16, 32, 8, 2), Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(32, 32, 8, 1)
    ),
    (False, 128): Config(
        Launch(32, 16, 8, 2), Launch(16, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 1)
    ),
}
