"""Builds the fuzz target (fuzz.cpp) for every instruction set of a processor and runs it on each.

    python tests/native/fuzz.py plain|address|thread|arm64 [--first SEED] [--cases N]

"address" is AddressSanitizer with UndefinedBehaviorSanitizer, "thread" is ThreadSanitizer, "arm64" is cross-compiled
and run under user-mode emulation (Debian: g++-aarch64-linux-gnu, qemu-user-static). Exits with 1 if a case fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from setup import OTHERS, instruction_sets, presence  # noqa: E402

SOURCES = {
    "fuzz": "tests/native/fuzz.cpp",
    "dispatch": "csrc/cpu/dispatch.cpp",
    "memory": "csrc/cpu/memory.cpp",
    "parallel": "csrc/cpu/parallel.cpp",
}


@dataclass
class Mode:
    flags: list[str]
    compiler: str = os.environ.get("CXX", "g++")
    sets: list[tuple[str, int, int, str]] = field(default_factory=instruction_sets)
    runner: tuple[str, ...] = ()


MODES = {
    "plain": Mode(["-O2"]),
    "address": Mode(["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
    "thread": Mode(["-O1", "-g", "-fsanitize=thread"]),
    "arm64": Mode(["-O2", "-static"], "aarch64-linux-gnu-g++", OTHERS, ("qemu-aarch64-static",)),
}


def build(mode: Mode, folder: Path) -> Path:
    """The program, compiled into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    common = [mode.compiler, "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", *mode.flags]
    common += [f"-I{ROOT / 'csrc'}", *(f"-D{name}={value}" for name, value in presence(mode.sets))]
    jobs = {name: [str(ROOT / path)] for name, path in SOURCES.items()}
    for name, vector_bytes, tile_rows, flags in mode.sets:
        macros = [f"-DBYOL_ISA={name}", f"-DBYOL_VECTOR_BYTES={vector_bytes}", f"-DBYOL_TILE_ROWS={tile_rows}"]
        # Of the results of the cases, some are larger.
        macros.append("-DBYOL_LARGE_BYTES=4096")
        jobs[name] = [str(ROOT / "csrc/cpu/kernels.cpp"), *macros, *flags.split()]
    objects = {name: str(folder / f"{name}.o") for name in jobs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: subprocess.run([*common, *jobs[name], "-c", "-o", objects[name]], check=True), jobs))
    program = folder / "fuzz"
    subprocess.run([*common, *objects.values(), "-ldl", "-lpthread", "-o", str(program)], check=True)
    return program


def run(mode: Mode, program: Path, arguments: list[str], instruction_set: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BYOL_FAST_CPU": instruction_set}
    return subprocess.run([*mode.runner, str(program), *arguments], env=environment, stderr=subprocess.PIPE, text=True)


def runnable(mode: Mode, program: Path) -> list[str]:
    """The instruction sets that this processor has, as the dispatcher lists them when asked for an unknown one."""
    refusal = run(mode, program, ["0", "0"], "?").stderr
    return refusal.partition("expected one of ")[2].partition(" on this")[0].split(", ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--cases", type=int, default=300, metavar="N")
    options = parser.parse_args()
    mode = MODES[options.mode]
    program = build(mode, ROOT / "build" / f"fuzz-{options.mode}")
    failed = False
    for name in runnable(mode, program):
        result = run(mode, program, [str(options.first), str(options.cases)], name)
        failed |= result.returncode != 0
        print(result.stderr, end="", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
