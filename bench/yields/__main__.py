"""``python -m bench.yields [--quick]``: measure, write the results and the report page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import sklearn

from ..machine import describe
from .data import images
from .disk import larger_than_memory, stream
from .fits import compare
from .report import page

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run; quick figures say nothing, and do not replace the committed ones."""
    parser = argparse.ArgumentParser(prog="python -m bench.yields", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, results only in .benchmarks/")
    parser.add_argument("--only", choices=("fits", "stream", "large"), help="measure this part, keep the others")
    options = parser.parse_args()
    quick = options.quick
    results = ROOT / (".benchmarks/yield.json" if quick else "bench/results/yield.json")
    document = ROOT / (".benchmarks/yield.md" if quick else "docs/yield.md")
    results.parent.mkdir(exist_ok=True)
    measured: dict[str, Any] = json.loads(results.read_text()) if options.only and results.exists() else {}
    measured["machine"] = {**describe(), "scikit-learn": sklearn.__version__}
    parts = {
        # First, because what this process has in memory counts for the children that it forks.
        "large": lambda: larger_than_memory(200_000 if quick else 40_000_000, 2 << 30),
        "fits": lambda: compare(images()[: 2000 if quick else None], 64, 1 if quick else 7, 3 if quick else 120),
        "stream": lambda: stream(20_000 if quick else 1_000_000, 1 if quick else 5),
    }
    for name, run in parts.items():
        if options.only in (None, name):
            measured[name] = run()
            print(f"{name}: {json.dumps(measured[name])}", flush=True)
            results.write_text(json.dumps(measured, indent=1) + "\n")
    document.write_text(page(measured), encoding="utf-8")
    print(f"results: {results.relative_to(ROOT)}, report: {document.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
