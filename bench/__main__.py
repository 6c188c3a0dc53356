"""``python -m bench [--quick]``: run the suite, write the results and the report page of this instruction set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from .machine import instruction_set
from .report import write

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds, results only in .benchmarks/")
    quick = parser.parse_args().quick
    # Figures of a quick run say nothing: they replace no committed ones. Each kind of machine has its own.
    results = ROOT / (".benchmarks" if quick else "bench/results") / f"cpu-{instruction_set()}.json"
    pages = ROOT / (".benchmarks" if quick else "docs")
    results.parent.mkdir(exist_ok=True)
    pages.mkdir(exist_ok=True)
    # pytest-benchmark's own table tells seconds a sample, not a call, and nothing of the peers: the report replaces it.
    options = [
        f"--benchmark-json={results}",
        "--benchmark-quiet",
        "--disable-warnings",
        *(["--quick"] if quick else []),
    ]
    code = pytest.main([str(ROOT / "bench"), *options])
    page = write(results, pages)
    print(f"results: {results.relative_to(ROOT)}, report: {page.relative_to(ROOT)}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
