"""Extra memory of one call, measured in a process of its own.

The process warms the variant up, gives free memory back to the system, and then watches its own peak of resident
memory over one more call: every allocator counts, PyTorch's and the native core's alike. The call's results are part of
it; the operands are not. (Linux only; None elsewhere.)
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_bytes(case_id: str, variant: str) -> int | None:
    """Peak of extra memory of one call, in bytes."""
    if not _RESET.exists():
        return None
    command = [sys.executable, "-m", "bench.memory", case_id, variant]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return int(done.stdout)


def measure(case_id: str, variant: str) -> int:
    """As :func:`extra_bytes`, of this process."""
    from .cases import CASES, QUICK

    case = next(case for case in [*CASES, *QUICK] if case.id == case_id)
    run = case.variants(case.tensors())[variant]
    for _ in range(2):
        run()
    gc.collect()
    _release_memory()
    _RESET.write_text("5")
    before = _status("VmRSS")
    results = run()
    peak = _status("VmHWM")
    del results
    return peak - before


def _release_memory() -> None:
    ctypes.CDLL(None).malloc_trim(0)
    try:
        from byol_fast import _native
    except ImportError:
        return
    _native.release_memory()


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(measure(*sys.argv[1:]))
