"""``python -m bench.compress [PART …]``: measure, and write the results and their page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from byol_fast.files import replacing

from .. import machine
from .page import write
from .parts import PARTS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results/compress.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compress", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parts = []
    for wanted in parser.parse_args().parts or list(PARTS):
        # A name, or what several names begin with.
        found = [wanted] if wanted in PARTS else [name for name in PARTS if name.startswith(wanted)]
        if not found:
            parser.error(f"PART: expected one of {', '.join(PARTS)}, got {wanted}")
        parts += found
    for name in parts:
        measured = PARTS[name]()
        # Read late: another part may have been measured meanwhile.
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        results["machine"] = {key: value for key, value in machine.describe().items() if key != "peak"}
        results[name] = measured
        with replacing(RESULTS) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write(results, ROOT / "docs")


if __name__ == "__main__":
    main()
