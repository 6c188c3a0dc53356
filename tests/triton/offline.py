"""Compiles the kernels for GPUs that are not there, as they would be launched, and reads what they take.

resources.json holds that for every kernel × dtype × rank × architecture, with a digest of what was compiled: after a
change, ``python tests/triton/offline.py --write`` compiles what changed. ``--check`` compiles nothing and says what is
missing, stale, or does not fit; ``--covering`` compiles some of every kernel again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from launches import DTYPES, RANKS, launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BOUNDS = Path(__file__).with_name("resources.json")
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = "gfx942"
ARCHITECTURES = (*NVIDIA, AMD)
# Bytes a program may have, on the smallest chip that the code for the architecture runs on (99 KB on sm_86 and sm_89).
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, AMD: 65_536}
# The instructions of matrix units, in machine code, and the one of each architecture for wide products.
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "v_mfma")
WIDE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", AMD: "v_mfma"}
# Kernels that read the data and multiply it; the others only multiply what is as small as the weights, or nothing.
WIDE_KERNELS = ("encode", "collect", "forward", "backward", "data_gradients")


@dataclass(frozen=True)
class Build:
    """A kernel as an operation launches it for a dtype and rank, on an architecture."""

    architecture: str
    dtype: str
    rank: int
    kernel: str

    def __str__(self) -> str:
        return f"{self.architecture} {self.dtype} {self.rank} {self.kernel}"

    @property
    def instructions(self) -> tuple[str, ...]:
        """Instructions of the matrix unit of which it has to use one; none: float32 may not be rounded."""
        operation, kernel = self.kernel.split(".")
        if kernel == "prepare":
            # float64: AMD's is of another name, and of no concern; Triton 3.6 has none for sm_100.
            old = self.architecture == "sm_100" and triton.__version__.startswith("3.6.")
            return () if self.architecture == AMD or old else ("DMMA",)
        if self.dtype == "fp32" or operation.startswith("squared_error") or kernel not in WIDE_KERNELS:
            return ()
        wide = WIDE[self.architecture]
        # float32's tiles may have fewer rows than the widest instruction takes.
        return (wide, "HMMA") if self.dtype == "tf32" else (wide,)


@dataclass(frozen=True)
class Resources:
    """What the compiler says: registers a thread, bytes of spills a thread, bytes of shared memory, matrix units."""

    registers: int
    spills: int
    shared: int
    instructions: tuple[str, ...]


def builds(architectures: tuple[str, ...]) -> Iterator[Build]:
    """Every kernel × dtype × rank × architecture; what does not depend on the dtype or the rank, once."""
    for architecture in architectures:
        yield from (Build(architecture, *one) for one in _kernels())


def covering() -> Iterator[Build]:
    """One build in twenty-nine, so that every kernel is met, and every dtype, rank and architecture."""
    of_kernel: dict[str, list[Build]] = {}
    for one in builds(ARCHITECTURES):
        of_kernel.setdefault(repr(launches(one.dtype, one.rank)[one.kernel].kernel), []).append(one)
    for place, found in enumerate(of_kernel.values()):
        yield from found[place % min(29, len(found)) :: 29]


@cache
def _kernels() -> list[tuple[str, int, str]]:
    found: dict[str, tuple[str, int, str]] = {}
    for dtype in DTYPES:
        for rank in RANKS:
            for kernel, launched in launches(dtype, rank).items():
                found.setdefault(launched.digest, (dtype, rank, kernel))
    return list(found.values())


def build(what: Build) -> Resources:
    """Compiles."""
    launched = launches(what.dtype, what.rank)[what.kernel]
    configuration = launched.configuration
    compiled = triton.compile(
        ASTSource(launched.kernel, *launched.specialised()),
        target=_target(what.architecture),
        options={"num_warps": configuration.warps, "num_stages": configuration.stages, "enable_fp_fusion": True},
    )
    if what.architecture == AMD:
        text = compiled.asm["amdgcn"]
        registers = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
        spills = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
        return Resources(registers, 4 * spills, compiled.metadata.shared, _matrix_units(text))
    registers, spills, sass = _inspect(compiled.asm["cubin"])
    return Resources(registers, spills, compiled.metadata.shared, _matrix_units(sass))


def _matrix_units(code: str) -> tuple[str, ...]:
    return tuple(name for name in INSTRUCTIONS if re.search(rf"\b{name}", code))


def _target(architecture: str) -> GPUTarget:
    if architecture == AMD:
        return GPUTarget("hip", AMD, 64)
    return GPUTarget("cuda", int(architecture[3:]), 32)


def _inspect(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the machine code, by the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", file.name)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))  # type: ignore[union-attr]
    return registers, stack, sass


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def build_all(what: list[Build], done: Callable[[Build, Resources | str], None]) -> None:
    """Calls ``done`` with the resources of each build, or the error it ended in; as many at a time as processors."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for one, result in zip(what, pool.map(_attempt, what), strict=True):
            done(one, result)


def _attempt(what: Build) -> Resources | str:
    try:
        return build(what)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def committed() -> dict[str, Any]:
    """``{"triton": version, "builds": {build: resources and digest}}``."""
    found: dict[str, Any] = json.loads(BOUNDS.read_text(encoding="utf-8"))
    return found


def write(table: dict[str, dict[str, Any]]) -> None:
    """Keeps what is in the matrix, one build a line."""
    names = sorted({str(one) for one in builds(ARCHITECTURES)} & set(table))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in names)
    BOUNDS.write_text(f'{{"triton": "{triton.__version__}", "builds": {{\n{lines}\n}}}}\n', encoding="utf-8")


def stale(what: Build, table: dict[str, dict[str, Any]]) -> bool:
    """Whether the matrix does not know the kernel as it is now."""
    return table.get(str(what), {}).get("digest") != launches(what.dtype, what.rank)[what.kernel].digest


def complaint(what: Build, found: Resources | str) -> str | None:
    """None, or what is wrong with a build in itself: it failed, does not fit the chip, lost the matrix unit."""
    if isinstance(found, str):
        return f"{what}: {found}"
    if found.shared > SHARED[what.architecture]:
        return f"{what}: {found.shared} bytes of shared memory, the chip has {SHARED[what.architecture]}"
    if what.instructions and not set(what.instructions) & set(found.instructions):
        expected = " or ".join(what.instructions)
        return f"{what}: no {expected}, but {', '.join(found.instructions) or 'no matrix unit'}"
    return None


def check() -> list[str]:
    """What is wrong with the committed matrix."""
    table, complaints = committed()["builds"], []
    for one in builds(ARCHITECTURES):
        if stale(one, table):
            complaints.append(f"{one}: resources.json does not know it as it is now (offline.py --write)")
        else:
            found = {name: value for name, value in table[str(one)].items() if name != "digest"}
            complaints.append(complaint(one, Resources(**found)) or "")
    return [one for one in complaints if one]


def compile_and_compare(wanted: list[Build], store: bool) -> list[str]:
    """What is wrong with the builds, or differs from what was committed; ``store``: that becomes what they take now."""
    known = committed() if BOUNDS.exists() else {"triton": triton.__version__, "builds": {}}
    table, complaints = known["builds"], []

    def done(one: Build, result: Resources | str) -> None:
        print(f"{one}: {result}", flush=True)
        found = complaint(one, result)
        if store and isinstance(result, Resources):
            table[str(one)] = {**vars(result), "digest": launches(one.dtype, one.rank)[one.kernel].digest}
            write(table)
        # Another version of the compiler spills as it will.
        elif isinstance(result, Resources) and known["triton"] == triton.__version__:
            bound = table.get(str(one), {}).get("spills", 0)
            if result.spills > bound:
                found = f"{one}: {result.spills} bytes of spills, {bound} were committed"
        complaints.append(found or "")

    build_all(wanted, done)
    return [one for one in complaints if one]


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="compile what changed, and write resources.json")
    how.add_argument("--check", action="store_true", help="compile nothing; say what is wrong with resources.json")
    how.add_argument("--covering", action="store_true", help="compile some of every kernel")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="builds whose name contains this")
    options = parser.parse_args()
    started = time.time()
    if options.check:
        complaints, count = check(), 0
    else:
        every = covering() if options.covering else builds(tuple(options.architectures))
        table = committed()["builds"] if BOUNDS.exists() else {}
        wanted = [one for one in every if options.only in str(one) and (not options.write or stale(one, table))]
        complaints, count = compile_and_compare(wanted, options.write), len(wanted)
    print("\n".join([f"{count} builds in {time.time() - started:.0f} s", *complaints]))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(_main())
