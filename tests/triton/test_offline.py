"""Every Triton kernel compiled for sm_80, sm_90, sm_100 and gfx942, without a GPU: see offline.py.

The whole matrix is committed with a digest of what was compiled, so that a kernel or a configuration cannot change
without it; a part of it that meets every kernel, dtype, rank and architecture is compiled anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("how", ["--check", "--covering"])
def test_kernels_compile_fit_and_spill_no_more_than_committed(how: str) -> None:
    # In a process of its own, for Triton decides at import whether it compiles or interprets.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline.py")), how],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
