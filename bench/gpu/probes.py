"""First measurements: what the card's memory and matrix units can do, and how they round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
import triton
import triton.language as tl

import byol_fast as bf
from byol_fast.backends import kernels
from byol_fast.backends.cuda import Cuda

from .device import DEVICE, REHEARSAL, microseconds


@triton.jit
def _product(a, b, c, DEPTH: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr):
    """c = a·b of [64, DEPTH] and [DEPTH, 64], summed over DEPTH in one accumulator."""
    i = tl.arange(0, 64)
    k = tl.arange(0, STEP)
    total = tl.zeros([64, 64], dtype=tl.float32)
    for first in range(0, DEPTH, STEP):
        left = tl.load(a + i[:, None] * DEPTH + first + k[None, :])
        right = tl.load(b + (first + k)[:, None] * 64 + i[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + i[:, None] * 64 + i[None, :], total)


@triton.jit
def _read_again(x, out, COUNT: tl.constexpr, TIMES: tl.constexpr):
    """Reads COUNT elements TIMES times, from the second time on out of the L2 cache."""
    i = tl.arange(0, 4096)
    total = tl.zeros([4096], dtype=tl.float32)
    for _ in range(TIMES):
        for first in range(0, COUNT, 4096):
            total += tl.load(x + first + i, cache_modifier=".cg")
    tl.store(out + tl.program_id(0), tl.sum(total))


def copy_bandwidth() -> dict[str, float]:
    source = torch.zeros(2**20 if REHEARSAL else 2**30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    times = microseconds(lambda: target.copy_(source))
    return {"bytes_per_s": 2e6 * source.numel() / times["median_us"], **times}


def matrix_peak() -> dict[str, float]:
    size = 256 if REHEARSAL else 8192
    a = torch.randn(size, size, device=DEVICE).bfloat16()
    times = microseconds(lambda: a @ a)
    return {"operations_per_s": 2e6 * size**3 / times["median_us"], **times}


def cache_read_rate() -> dict[str, float]:
    count, programs, repeats = (4096, 2, 2) if REHEARSAL else (2**20, 1024, 8)
    x, out = torch.zeros(count, device=DEVICE), torch.empty(programs, device=DEVICE)
    times = microseconds(lambda: _read_again[(programs,)](x, out, count, repeats))
    return {"bytes_per_s": 4e6 * count * programs * repeats / times["median_us"], **times}


def accumulator_rounding() -> dict[str, float]:
    """The mean relative error of sums of positive products, by depth: truncation shows as a drift below zero."""
    found = {}
    for depth in (512,) if REHEARSAL else (512, 4096, 32768):
        a, b = (torch.rand(size, device=DEVICE).half() for size in ((64, depth), (depth, 64)))
        found[f"float16, depth {depth}"] = _drift(a, b, depth, "ieee")
    a, b = torch.rand(64, 512, device=DEVICE), torch.rand(512, 64, device=DEVICE)
    for precision in ("ieee", *(() if REHEARSAL else ("bf16x6", "tf32x3"))):
        found[f"float32 as {precision}, depth 512"] = _drift(a, b, 512, precision)
    return found


def tf32_truncation() -> dict[str, float]:
    """1 + 3·2⁻¹² times 1 in tf32 is 1 truncated, 1 + 2⁻¹⁰ rounded: the share of a unit in the last place added."""
    a, b = torch.full((64, 32), 1 + 3 * 2**-12, device=DEVICE), torch.zeros(32, 64, device=DEVICE)
    b[0] = 1
    out = torch.empty(64, 64, device=DEVICE)
    _product[(1,)](a, b, out, 32, "tf32", 32)
    return {"units_added": (out[0, 0].item() - 1) / 2**-10}


def cluster_push_rate() -> dict[str, float | str]:
    """What blocks of Hopper's clusters push to each other's shared memory, by blocks of a cluster."""
    status = bf.backends()["cuda"]
    if not status.available:
        return {"not measured": f"cuda is {status}"}
    if not REHEARSAL and torch.cuda.get_device_capability(DEVICE) != (9, 0):
        return {"not measured": "clusters are used on sm_90 only"}
    push, rounds = cast(Cuda, kernels("cuda")).push_in_clusters, 1 if REHEARSAL else 64
    found: dict[str, float | str] = {}
    for cluster in (2, 4, 8):
        times = microseconds(lambda cluster=cluster: push(cluster, rounds, DEVICE))  # type: ignore[misc]
        found[f"bytes_per_s, {cluster} blocks"] = 1e6 * push(cluster, rounds, DEVICE) / times["median_us"]
    return found


def _drift(a: torch.Tensor, b: torch.Tensor, depth: int, precision: str) -> float:
    out = torch.empty(64, 64, device=DEVICE)
    _product[(1,)](a, b, out, depth, precision, 32)
    truth = a.double() @ b.double()
    return ((out.double() - truth) / truth).mean().item()


PROBES: Mapping[str, Callable[[], Mapping[str, float | str]]] = {
    "copy_bandwidth": copy_bandwidth,
    "matrix_peak": matrix_peak,
    "cache_read_rate": cache_read_rate,
    "accumulator_rounding": accumulator_rounding,
    "tf32_truncation": tf32_truncation,
    "cluster_push_rate": cluster_push_rate,
}
