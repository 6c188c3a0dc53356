"""The machine: what it is, and the most it can do."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

import byol_fast as bf


@functools.cache
def describe() -> dict[str, object]:
    """Device, versions, threads, instruction set and measured peaks; no names of hosts or users."""
    return {
        "device": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "pytorch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "byol_fast": bf.__version__,
        "peak": peaks(),
    }


def instruction_set() -> str:
    """That the native core runs on; ``none`` where the package was built without it."""
    try:
        from byol_fast import _native
    except ImportError:
        return "none"
    return _native.info()["instruction_set"]


def peaks() -> dict[str, float]:
    """Operations a second by dtype, a multiply-add being two, and ``tiles``, those of bfloat16 in the matrix unit;
    for ``copy``, bytes read and written a second."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        compiler = os.environ.get("CXX", "c++").split()
        source = str(Path(__file__).with_name("peak.cpp"))
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        subprocess.run([*compiler, *flags, source, "-o", str(program)], check=True)
        done = subprocess.run([str(program), str(torch.get_num_threads())], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


# As how many products of bfloat16 the kernels make one of a dtype (csrc/cpu/matrix_unit.h).
_PRODUCTS = {"float32": 6, "bfloat16": 1}


def arithmetic_peak(peak: dict[str, float], dtype: str) -> float:
    """Operations a second at best, by multiply-adds or dot products or, where there are any, by tiles of bfloat16."""
    return max(peak[dtype], peak.get("tiles", 0) / _PRODUCTS[dtype])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
