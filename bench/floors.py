"""``python -m bench.floors``: the least times of the training step, part by part, beside what was measured.

Everything comes from ``bench/results/cpu-*.json``; the tables are those in ``docs/cpu-kernels.md``.
"""

from __future__ import annotations

import json
from pathlib import Path

from .cases import OURS
from .machine import arithmetic_peak

RESULTS = Path(__file__).with_name("results")
HEADER = """| dtype, N, D, K | wide products | small products | floor, ms | byol_fast, ms | share of floor | at the floor, over eager | over torch.compile |
| --- | --- | --- | --- | --- | --- | --- | --- |"""  # noqa: E501


def row(case: dict, peak: dict[str, float]) -> str:
    """One shape: 8·N·D·K operations in its dtype, 3·N·K² + 3·D·K² in float32, X read once."""
    rows, features, rank, dtype = case["rows"], case["features"], case["rank"], case["dtype"]
    wide = 8 * rows * features * rank / arithmetic_peak(peak, dtype)
    small = 3 * (rows + features) * rank**2 / arithmetic_peak(peak, "float32")
    traffic = rows * features * (2 if dtype == "bfloat16" else 4) / peak["copy"]
    floor = max(wide + small, traffic)
    ours, *peers = (case["variants"][name]["p50"] for name in (OURS, "eager", "compiled"))
    ratios = " | ".join(f"{seconds / floor:.1f}×" for seconds in peers)
    times = " | ".join(f"{1e3 * seconds:.1f}" for seconds in (wide, small, floor, ours))
    return f"| {dtype}, {rows}, {features}, {rank} | {times} | {floor / ours:.0%} | {ratios} |"


def main() -> None:
    for results in sorted(RESULTS.glob("cpu-*.json")):
        document = json.loads(results.read_text())
        machine = document["machine_info"]
        cases = [benchmark["extra_info"] for benchmark in document["benchmarks"]]
        # A dtype that the machine has no arithmetic for has no peak, and no floor.
        steps = [
            case
            for case in cases
            if case["operation"] == "step" and case["ratio"] == 1 and case["dtype"] in machine["peak"]
        ]
        rows = [row(case, machine["peak"]) for case in steps]
        print(f"### {machine['instruction_set']}", "", HEADER, *rows, "", sep="\n")


if __name__ == "__main__":
    main()
