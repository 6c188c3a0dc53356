"""``python -m bench.crossovers``: the native kernels against PyTorch's own operations, where either may be faster.

The rules of ``byol_fast/backends/crossovers.py`` are fitted to this. Each case runs both in turn, and tells what
``auto`` chooses. Results: ``bench/results/crossovers-INSTRUCTION_SET.json``; the table is printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import byol_fast as bf
from byol_fast import files
from byol_fast.backends import Call, choose

from .machine import describe

SECONDS = 0.3
# Operation of the registry, and whether gradients of the weights and biases are wanted.
OPERATIONS = {
    "layer": (bf.bottleneck, False),
    "layer and backward": (bf.bottleneck, True),
    "loss": (bf.bottleneck_mse_loss, False),
    "step": (bf.bottleneck_mse_loss, True),
}
SHAPES = {
    torch.float32: [
        *[(rows, 1024, 64) for rows in (16, 64, 256, 512, 1024, 4096)],
        *[(rows, 256, 16) for rows in (256, 1024, 4096)],
        *[(rows, 1024, 16) for rows in (256, 1024)],
        (512, 768, 64), (512, 768, 128), (1024, 768, 128), (2048, 768, 128),
        (4096, 1024, 16), (8192, 1024, 16), (8192, 1024, 64), (2048, 256, 128), (2048, 512, 256), (4096, 1024, 256),
        (2048, 1024, 512), (4096, 256, 256),
    ],
    torch.bfloat16: [(1, 1024, 64), (16, 1024, 64), (16, 256, 16), (64, 256, 16), (64, 1024, 64), (1024, 1024, 64),
        *[(rows, 768, 64) for rows in (256, 512, 2048)], (1024, 256, 16), (4096, 256, 16), (8192, 1024, 16),
        (4096, 1024, 64), (16384, 1024, 64), (2048, 768, 128), (2048, 512, 256), (4096, 1024, 256), (16384, 1024, 256),
        (2048, 1024, 512)],
    torch.float16: [(16, 1024, 64), (16, 256, 16), (64, 256, 16), (1024, 1024, 64)],
}  # fmt: skip
HEADER = "| operation, dtype, N, D, K | PyTorch, ms | native, ms | native over PyTorch | auto takes |"


def runs(operation: str, tensors: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    function, gradients = OPERATIONS[operation]
    x, *weights = tensors
    weights = [weight.detach().requires_grad_(gradients) for weight in weights]
    cotangent = torch.randn_like(x) if function is bf.bottleneck else None

    def run(backend: str) -> object:
        with bf.use_backend(backend), torch.set_grad_enabled(gradients):
            output = function(x, *weights)
            return torch.autograd.grad(output, weights, cotangent) if gradients else output

    return {backend: lambda backend=backend: run(backend) for backend in ("reference", "native")}


def seconds_of(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians, of samples of at least a millisecond taken in turn."""
    for run in variants.values():
        run()
        run()
    calls = max(1, int(1e-3 / timed(variants["native"], 1)))
    rounds = max(5, int(SECONDS / sum(timed(run, calls) for run in variants.values())))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            samples[name].append(timed(run, calls) / calls)
    return {name: median(times) for name, times in samples.items()}


def timed(run: Callable[[], object], calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        run()
    return perf_counter() - start


def measure() -> list[dict]:
    cases = []
    for dtype, shapes in SHAPES.items():
        for rows, features, rank in shapes:
            sizes = ((rows, features), (rank, features), (features, rank), (rank,), (features,))
            tensors = [torch.randn(size).div_(size[-1] ** 0.5).to(dtype) for size in sizes]
            for operation, (function, gradients) in OPERATIONS.items():
                call = Call(function.__name__, dtype, rows, features, features, rank, gradients=gradients)
                cases.append({
                    "operation": operation, "dtype": str(dtype).removeprefix("torch."),
                    "rows": rows, "features": features, "rank": rank,
                    "auto": choose(tensors, call).backend, "seconds": seconds_of(runs(operation, tensors)),
                })  # fmt: skip
    return cases


def table(cases: list[dict]) -> str:
    lines = [HEADER, "| --- | --- | --- | --- | --- |"]
    for case in cases:
        reference, native = case["seconds"]["reference"], case["seconds"]["native"]
        name = f"{case['operation']}, {case['dtype']}, {case['rows']}, {case['features']}, {case['rank']}"
        factor = f"{reference / native:.2f}×"
        lines.append(f"| {name} | {1e3 * reference:.2f} | {1e3 * native:.2f} | {factor} | {case['auto']} |")
    return "\n".join(lines)


def main() -> None:
    cases, machine = measure(), describe()
    name = f"crossovers-{machine['instruction_set']}.json"
    with files.replacing(Path(__file__).with_name("results") / name) as path:
        path.write_text(json.dumps({"machine_info": machine, "cases": cases}, indent=1) + "\n")
    print(table(cases))


if __name__ == "__main__":
    main()
