"""Compiles the CUDA kernels for the emulator (cuda/emulator.h) with a C++ compiler, and makes a backend of them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11

ROOT = Path(__file__).resolve().parents[1]
NAME = "_cuda_emulated"
COMPILER = os.environ.get("CXX", "g++")
# Without contraction sums are what the source says; the fibers' longjmp is not what fortified code expects.
FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-pragmas", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"),
    *("-DBYOL_EMULATE", f"-DBYOL_MODULE={NAME}"),
]
KERNELS = ["-x", "c++", "csrc/cuda/kernels.cu"]
JOBS = {element: [*KERNELS, f"-DBYOL_ELEMENT={element}"] for element in ("Bf16", "Fp16", "float")}
JOBS |= {name: ["-x", "c++", f"csrc/cuda/{name}.cu"] for name in ("cluster", "push_rate")}
JOBS["bindings"] = ["csrc/bindings_cuda.cpp"]


def build(folder: Path) -> Path:
    """The extension module, compiled unless a former run left one of the same sources in ``folder``."""
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"], "csrc", "csrc/cuda", "tests/cuda"]
    common = [COMPILER, *FLAGS, *(f"-I{path}" for path in includes)]
    digest = hashlib.sha256(repr((common, JOBS, sys.version)).encode())
    headers = [*ROOT.glob("csrc/cuda/*"), ROOT / "csrc/bindings_cuda.cpp", *ROOT.glob("tests/cuda/*.h")]
    for path in sorted(headers):
        digest.update(path.read_bytes())
    folder = folder / digest.hexdigest()[:16]
    module = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    objects = {name: str(folder / f"{name}.o") for name in JOBS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: _run([*common, *JOBS[name], "-c", "-o", objects[name]]), JOBS))
    unfinished = module.with_suffix(f".{os.getpid()}")
    _run([COMPILER, "-shared", *objects.values(), "-o", str(unfinished)])
    os.replace(unfinished, module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load(path: Path, name: str = NAME) -> Any:
    """The module in a file, wherever it lies."""
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
