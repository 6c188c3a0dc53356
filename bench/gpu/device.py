"""The device a GPU run is on; with ``TRITON_INTERPRET=1``, the CPU, to rehearse the run."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable

import torch
from cuda_emulator import COMPILER, ROOT, build, load

import byol_fast as bf
from byol_fast.backends import verified
from byol_fast.backends.cuda import Cuda

REHEARSAL = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")


def available() -> list[str]:
    """The backends with kernels for this device; in a rehearsal the CUDA kernels are emulated, given a compiler."""
    if REHEARSAL and shutil.which(COMPILER) is not None:
        emulated = Cuda(load(build(ROOT / "build" / "emulated")), None, "cpu")
        sys.modules["byol_fast.backends"]._REGISTRY["cuda"] = emulated  # type: ignore[attr-defined]
    return [name for name in ("triton", "cuda", "gram") if bf.backends()[name].available]


def architecture() -> str:
    return "rehearsal" if REHEARSAL else verified.architecture(DEVICE)


def describe() -> dict[str, object]:
    """What was measured on, in words and versions; no names of hosts or users."""
    import triton

    described: dict[str, object] = {"torch": torch.__version__, "triton": triton.__version__}
    if REHEARSAL:
        return {"device": "CPU, Triton's interpreter", **described}
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        **described,
    }


def synchronise() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def microseconds(run: Callable[[], object], budget_s: float = 0.4) -> dict[str, float]:
    """Median, quartiles and number of the times of one call, the L2 cache emptied before each."""
    for _ in range(1 if REHEARSAL else 5):
        run()
    synchronise()
    flush = torch.empty(0 if REHEARSAL else 256 * 2**20, dtype=torch.int8, device=DEVICE)
    times: list[float] = []
    deadline = time.monotonic() + budget_s
    while len(times) < 3 or (time.monotonic() < deadline and len(times) < 200):
        flush.zero_()
        times.append(_once(run))
    quarters = statistics.quantiles(times, n=4)
    return {"median_us": statistics.median(times), "q1_us": quarters[0], "q3_us": quarters[2], "samples": len(times)}


def _once(run: Callable[[], object]) -> float:
    if REHEARSAL:
        started = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def extra_bytes(run: Callable[[], object]) -> int | None:
    """Peak memory of one call beyond what was there before, results included; None off GPUs."""
    if REHEARSAL:
        return None
    run()
    synchronise()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronise()
    return torch.cuda.max_memory_allocated() - before
