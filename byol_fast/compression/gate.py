"""The latency gate: a layer is replaced only where its bottleneck measures faster.

Dense layer and bottleneck are timed in turn, at the shape, dtype, device and autocast of the first call in calibration,
so that what else the machine does meets both alike. Figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .find import Site
from .kinds import Factors
from .statistics import Call

__all__ = ["Gate", "timed"]

_SECONDS = 0.25
_ROUNDS = (9, 200)


def timed(*functions: Callable[[], object], device: torch.device, seconds: float = _SECONDS) -> list[float]:
    """Median milliseconds of each function, called in turn."""
    for function in functions * 2:
        function()
    samples: list[list[float]] = [[] for _ in functions]
    begin = time.perf_counter()
    while len(samples[0]) < _ROUNDS[0] or (time.perf_counter() - begin < seconds and len(samples[0]) < _ROUNDS[1]):
        for function, times in zip(functions, samples, strict=True):
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in samples]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Gate:
    """Times of layers at ranks; layers that are alike are timed once.

    Args:
        margin: a bottleneck wins if it takes less than ``1 − margin`` of the dense layer's time.
    """

    def __init__(self, margin: float) -> None:
        self.margin = margin
        self._times: dict[Any, tuple[float, float]] = {}
        self._limits: dict[Any, int] = {}
        self._lost: set[Any] = set()

    def times(self, site: Site, call: Call, rank: int) -> tuple[float, float]:
        """Milliseconds of a call of the dense layer and of a bottleneck of this rank."""
        key = (*self._key(site, call), rank)
        if key not in self._times:
            self._times[key] = _times(site, call, rank)
        return self._times[key]

    def wins(self, site: Site, call: Call, rank: int) -> bool:
        """Whether a bottleneck of this rank measures faster than the dense layer by the margin.

        A loss is measured twice. What else the machine does only adds time, so the quicker measurement counts.
        """
        if self._faster(self.times(site, call, rank)):
            return True
        key = (*self._key(site, call), rank)
        if key not in self._lost:
            self._lost.add(key)
            self._times[key] = min(self._times[key], _times(site, call, rank), key=sum)
        return self._faster(self._times[key])

    def _faster(self, times: tuple[float, float]) -> bool:
        dense, bottleneck = times
        return bottleneck < (1 - self.margin) * dense

    def break_even(self, site: Site, call: Call) -> int:
        """The largest rank with fewer weights than the dense layer that wins, to an eighth of itself, or 0."""
        key = self._key(site, call)
        if key not in self._limits:
            self._limits[key] = self._search(site, call)
        return self._limits[key]

    def lower(self, site: Site, call: Call, rank: int) -> None:
        """A rank that measured slower after all: the break-even rank is below."""
        self._limits[self._key(site, call)] = min(self.break_even(site, call), rank - 1)

    def _search(self, site: Site, call: Call) -> int:
        upper = min(site.max_rank, (site.size - 1) // site.unit)
        if upper < 1 or not self.wins(site, call, 1):
            return 0
        if self.wins(site, call, upper):
            return upper
        lower = 1
        while upper - lower > max(lower // 8, 1):
            middle = (lower + upper) // 2
            # Ranks that are multiples of what vector registers hold are the fast ones.
            middle = middle // 8 * 8 if middle // 8 * 8 > lower else middle
            if self.wins(site, call, middle):
                lower = middle
            else:
                upper = middle
        return lower

    @staticmethod
    def _key(site: Site, call: Call) -> tuple[Any, ...]:
        return (repr(site.modules[0]), site.matrix.dtype, call)


@torch.no_grad()
def _times(site: Site, call: Call, rank: int) -> tuple[float, float]:
    module = site.modules[0]
    matrix = site.matrix
    groups, outputs, inputs = matrix.shape
    factors = Factors(
        torch.randn(groups, rank, inputs, device=matrix.device),
        torch.randn(groups, outputs, rank, device=matrix.device),
        torch.zeros(groups * outputs, device=matrix.device, dtype=torch.float64),
    )
    bottleneck = site.kind.replacement(module, factors).train(module.training)
    input = site.kind.example(module, call.shape, call.dtype, call.device)
    with torch.autocast(call.device.type, call.autocast, enabled=call.autocast is not None):
        dense_ms, bottleneck_ms = timed(_caller(module, input), _caller(bottleneck, input), device=call.device)
    return dense_ms, bottleneck_ms


def _caller(module: nn.Module, input: Tensor) -> Callable[[], object]:
    return lambda: module(input)
