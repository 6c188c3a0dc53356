"""Autotuning, for who asks for it: ``BYOL_FAST_TRITON_AUTOTUNE=1``.

The first call of each class of shapes runs several times: with the configuration of the table, and with those next to
it, one change at a time to one kernel at a time. The fastest serves the rest of the process. Not the default, because
results then differ, in the last digits, between processes as the times do, and because the first call takes seconds,
waits for the device, and cannot be captured in a CUDA graph (one that is captured first takes the table's).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config import Config, Launch, config, using

ENABLED = os.environ.get("BYOL_FAST_TRITON_AUTOTUNE") == "1"
_RUNS = 5
# By class of calls: the configuration that was fastest.
_fastest: dict[tuple[object, ...], Config] = {}

_Result = TypeVar("_Result")


def run(operation: Callable[..., _Result], kernels: tuple[str, ...], x: Tensor, rank: int, *arguments: Any) -> _Result:
    """``operation(x, *arguments)``, in the fastest configuration of these kernels if autotuning was asked for."""
    if not ENABLED:
        return operation(x, *arguments)
    shapes = tuple(_class(argument) for argument in (x, *arguments))
    key = (operation.__name__, x.device, x.dtype, shapes)
    if key not in _fastest:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return operation(x, *arguments)
        _fastest[key] = _search(lambda: operation(x, *arguments), kernels, config(rank, x.dtype != torch.float32), x)
    with using(_fastest[key]):
        return operation(x, *arguments)


def _class(argument: object) -> object:
    """Sizes within a factor of two are alike; flags and names are what they are."""
    return tuple(size.bit_length() for size in argument.shape) if isinstance(argument, Tensor) else str(argument)


def _search(call: Callable[[], object], kernels: tuple[str, ...], table: Config, x: Tensor) -> Config:
    # Triton is imported by whoever launches, at first use.
    from triton import TritonError

    best, least = table, _seconds(call, table, x)
    for kernel in kernels:
        for launch in _neighbours(getattr(table, kernel)):
            candidate = replace(best, **{kernel: launch})
            # A tile of rows of pass 2 lies in one of pass 1, which decides on the direct form.
            if candidate.collect.rows > candidate.encode.rows:
                continue
            try:
                seconds = _seconds(call, candidate, x)
            except (RuntimeError, TritonError):
                # It does not fit this GPU, or does not compile for it; the table's own, above, has to.
                continue
            if seconds < least:
                best, least = candidate, seconds
    return best


def _neighbours(launch: Launch) -> Iterator[Launch]:
    """What differs by one factor of two, or by one stage, within what the kernels are made for."""
    bounds = {"rows": (16, 256), "columns": (16, 256), "warps": (2, 16)}
    for name, (least, most) in bounds.items():
        for value in (getattr(launch, name) // 2, getattr(launch, name) * 2):
            if least <= value <= most:
                yield replace(launch, **{name: value})
    for stages in (launch.stages - 1, launch.stages + 1):
        if 1 <= stages <= 4:
            yield replace(launch, stages=stages)


def _seconds(call: Callable[[], object], candidate: Config, x: Tensor) -> float:
    """The median of a few calls after one that compiles."""
    with using(candidate):
        call()
        times = []
        for _ in range(_RUNS):
            _wait(x)
            started = time.perf_counter()
            call()
            _wait(x)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
