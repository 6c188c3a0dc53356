"""Benchmarks: ``python -m bench`` times every case, measures memory, and writes the report page."""

import sys
from pathlib import Path

# A speed counts only under the accuracy contract that the tests keep: bench imports it from there.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
