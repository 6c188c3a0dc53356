"""``python -m bench.threads``: do the native kernels slow PyTorch's own operations down?

Two pools of threads that spin while they wait take each other's cores. So PyTorch's operations are timed in a process
that has not called the kernels yet, then in turn alone, each right after one of our training steps, and each right
after an eager one, which tells what any step does to the caches. The threads of the process are counted, too. Results:
``bench/results/threads.json``; the table is printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import byol_fast as bf
from byol_fast import files, reference

from .machine import describe

RESULTS = Path(__file__).with_name("results") / "threads.json"
ROUNDS = 100
SETTINGS = ("before the first call", "alone", "after our step", "after an eager step")
HEADER = f"| PyTorch's operation, ms | {' | '.join(SETTINGS)} | after ours / after eager | alone / before |"


def operations() -> dict[str, Callable[[], object]]:
    """PyTorch's own work, on all of its threads: arithmetic, memory, and calls so short that waking threads counts."""
    square, wide, short = torch.randn(768, 768), torch.randn(4096, 1024), torch.randn(256, 256)
    return {
        "product of 768 × 768": lambda: square @ square,
        "gelu of 4096 × 1024": lambda: torch.nn.functional.gelu(wide),
        "product of 256 × 256": lambda: short @ short,
    }


def steps() -> dict[str, Callable[[], object]]:
    """A training step of 2048 × 512 × 32, by the kernels and by autograd."""
    x, encoder = torch.randn(2048, 512), torch.randn(32, 512).div_(23).requires_grad_()
    decoder = torch.randn(512, 32).div_(6).requires_grad_()

    def ours() -> object:
        with bf.use_backend("native"):
            return torch.autograd.grad(bf.bottleneck_mse_loss(x, encoder, decoder), (encoder, decoder))

    def eager() -> object:
        return torch.autograd.grad(reference.bottleneck_mse_loss(x, encoder, decoder), (encoder, decoder))

    return {"alone": lambda: None, "after our step": ours, "after an eager step": eager}


def timed(operation: Callable[[], object]) -> float:
    start = perf_counter()
    operation()
    return perf_counter() - start


def measure() -> dict[str, object]:
    pytorch, between = operations(), steps()
    samples = {name: {setting: [] for setting in SETTINGS} for name in pytorch}
    for _ in range(ROUNDS):
        for name, operation in pytorch.items():
            samples[name][SETTINGS[0]].append(timed(operation))
    threads_before = threads()
    for _ in range(ROUNDS):
        for setting, step in between.items():
            for name, operation in pytorch.items():
                step()
                samples[name][setting].append(timed(operation))
    medians = {name: {setting: median(times) for setting, times in found.items()} for name, found in samples.items()}
    return {"rounds": ROUNDS, "threads_before": threads_before, "threads_after": threads(), "seconds": medians}


def threads() -> int:
    """Threads of this process (Linux)."""
    return len(list(Path("/proc/self/task").iterdir()))


def table(document: dict) -> str:
    lines = [HEADER, "|" + " --- |" * (len(SETTINGS) + 3)]
    for name, seconds in document["seconds"].items():
        before, alone, ours, eager = (seconds[setting] for setting in SETTINGS)
        times = " | ".join(f"{1e3 * value:.2f}" for value in (before, alone, ours, eager))
        lines.append(f"| {name} | {times} | {ours / eager:.2f}× | {alone / before:.2f}× |")
    return "\n".join(lines)


def main() -> None:
    found = measure()
    with files.replacing(RESULTS) as path:
        path.write_text(json.dumps({"machine_info": describe(), **found}, indent=2) + "\n")
    print(table(found))
    print(f"threads of the process: {found['threads_before']} before the first call, {found['threads_after']} after")


if __name__ == "__main__":
    main()
