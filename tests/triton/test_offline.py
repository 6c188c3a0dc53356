"""Every Triton kernel compiled for GPUs that are not there: it compiles, fits, spills no more, uses the matrix unit.

In a process without the interpreter's variable. CI compiles every kernel × dtype × rank on one architecture in turns;
``make triton-offline`` compiles all of them on all architectures, AMD's among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
CODE = """
import offline
complaints = []
def done(one, found):
    complaint = offline.complaint(one, found)
    if complaint is not None:
        complaints.append(complaint)
wanted = list(offline.covering())
assert len(wanted) > 80, len(wanted)
offline.build_all(wanted, done)
raise SystemExit("\\n".join(complaints))
"""


def test_kernels_compile_fit_and_do_not_spill(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS / "triton"), str(TESTS.parent)])
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
