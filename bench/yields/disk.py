"""Matrices on disk: speed against a fit in memory, extra memory, and a file many times larger than the memory allowed.

Each measurement of memory is a process of its own: ``python -m bench.yields.disk WHAT FILE``.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA

import byol_fast as bf
from byol_fast.data import open_matrix

from .data import write_patches

ROOT = Path(__file__).resolve().parents[2]
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def ours(path: Path) -> Any:
    """One pass over the file."""
    matrix = open_matrix(path)
    pca = bf.StreamingPCA(matrix.shape[1]).partial_fit(matrix)
    pca.components()
    return pca


def in_memory(array: np.ndarray[Any, Any]) -> Any:
    """scikit-learn's fastest for this shape."""
    return PCA(svd_solver="covariance_eigh").fit(array)


def stream(rows: int, rounds: int) -> dict[str, Any]:
    """Seconds, interleaved: ours from the file; scikit-learn's from memory, and with reading the file into it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patches.npy"
        write_patches(path, rows)
        array = np.load(path)
        variants = {
            "byol_fast, from the file": lambda: ours(path),
            "scikit-learn, from memory": lambda: in_memory(array),
            "scikit-learn, read and fit": lambda: in_memory(np.load(path)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds + 1):
            for name, run in variants.items():
                begin = time.perf_counter()
                run()
                if number:
                    seconds[name].append(time.perf_counter() - begin)
        exact = torch.from_numpy(in_memory(np.load(path).astype(np.float64)).explained_variance_)
        error = float((ours(path).explained_variance_ - exact).norm() / exact.norm())
        memory = {name: int(_child(name, path)) for name in ("ours", "theirs")}
    return {
        "rows": [rows, 100],
        "seconds": {name: float(np.median(times)) for name, times in seconds.items()},
        "rounds": rounds,
        "error_of_variances": error,
        "extra_bytes": memory,
    }


def larger_than_memory(rows: int, limit: int) -> dict[str, Any]:
    """``byol-fast pretrain`` where the process may allocate no more than ``limit`` bytes (RLIMIT_DATA)."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patches.npy"
        write_patches(path, rows)
        command = [sys.executable, "-m", "byol_fast", "pretrain", str(path), "--rank", "16", "--history", "history.csv"]
        begin = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        told = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
        return {
            "bytes": path.stat().st_size,
            "rows": [rows, 100],
            "limit_bytes": limit,
            "completed": done.returncode == 0,
            "error": done.stderr.splitlines()[-1:] if done.returncode else [],
            "seconds": seconds,
            "largest_resident_bytes_of_a_child": peak,
            "told": {key: told.get(key, "").strip() for key in ("yield", "certificate")},
        }


def _child(what: str, path: Path) -> str:
    command = [sys.executable, "-m", "bench.yields.disk", what, str(path)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _extra_bytes(what: str, path: Path) -> int:
    """Peak of resident memory beyond what the process has once it has fitted 1,000 rows."""
    small = np.load(path, mmap_mode="r")[:1000].copy()
    bf.StreamingPCA(100).partial_fit(small).components()
    in_memory(small)
    gc.collect()
    _RESET.write_text("5")
    before = _status("VmRSS")
    result = ours(path) if what == "ours" else in_memory(np.load(path))
    peak = _status("VmHWM")
    del result
    return peak - before


if __name__ == "__main__":
    print(json.dumps(_extra_bytes(sys.argv[1], Path(sys.argv[2]))))
