"""``python -m bench.floors``: the least times of the training step, part by part, beside what was measured.

Everything comes from ``bench/results/cpu.json``; the table is the one in ``docs/cpu-kernels.md``.
"""

from __future__ import annotations

import json
from pathlib import Path

from .cases import OURS

RESULTS = Path(__file__).with_name("results") / "cpu.json"
HEADER = """| dtype, N, D, K | wide products | small products | floor, ms | byol_fast, ms | share of floor | at the floor, over eager | over torch.compile |
| --- | --- | --- | --- | --- | --- | --- | --- |"""  # noqa: E501


def row(case: dict, peak: dict[str, float]) -> str:
    """One shape: 8·N·D·K operations in its dtype, 4·N·K² + 4·D·K² in float32, X read once."""
    rows, features, rank, dtype = case["rows"], case["features"], case["rank"], case["dtype"]
    wide = 8 * rows * features * rank / peak[dtype]
    small = 4 * (rows + features) * rank**2 / peak["float32"]
    traffic = rows * features * (2 if dtype == "bfloat16" else 4) / peak["copy"]
    floor = max(wide + small, traffic)
    ours, *peers = (case["variants"][name]["p50"] for name in (OURS, "eager", "compiled"))
    ratios = " | ".join(f"{seconds / floor:.1f}×" for seconds in peers)
    times = " | ".join(f"{1e3 * seconds:.1f}" for seconds in (wide, small, floor, ours))
    return f"| {dtype}, {rows}, {features}, {rank} | {times} | {floor / ours:.0%} | {ratios} |"


def main() -> None:
    document = json.loads(RESULTS.read_text())
    cases = [benchmark["extra_info"] for benchmark in document["benchmarks"]]
    steps = [case for case in cases if case["operation"] == "step" and case["ratio"] == 1]
    print(HEADER, *(row(case, document["machine_info"]["peak"]) for case in steps), sep="\n")


if __name__ == "__main__":
    main()
