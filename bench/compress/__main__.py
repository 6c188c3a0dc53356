"""``python -m bench.compress [PART …]``: measure, and write the results and their page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from byol_fast.files import replacing

from .. import machine
from .page import write
from .parts import PARTS, Result

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results/compress.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compress", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parts: list[str] = []
    for wanted in parser.parse_args().parts or list(PARTS):
        # A name, or what several names begin with.
        names = [wanted] if wanted in PARTS else [name for name in PARTS if name.startswith(wanted)]
        if not names:
            parser.error(f"PART: expected one of {', '.join(PARTS)}, got {wanted}")
        parts += names
    for name in parts:
        measured = PARTS[name]()
        for found in measured if isinstance(measured, Iterator) else [measured]:
            _save(name, found)


def _save(name: str, found: Result) -> None:
    # Read late: another part may have been measured meanwhile.
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results["machine"] = {key: value for key, value in machine.describe().items() if key != "peak"}
    results[name] = found
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write(results, ROOT / "docs")


if __name__ == "__main__":
    main()
