"""Builds the fuzz target (fuzz.cpp) for every instruction set of this processor and runs it on each.

    python tests/native/fuzz.py plain|address|thread [--first SEED] [--cases N]

"address" is AddressSanitizer with UndefinedBehaviorSanitizer, "thread" is ThreadSanitizer. Exits with 1 if a case fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from setup import X86, instruction_sets  # noqa: E402

MODES = {
    "plain": ["-O2"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


def build(mode: str, folder: Path) -> Path:
    """The program, compiled into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    common = [os.environ.get("CXX", "g++"), "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
    common += [f"-I{ROOT / 'csrc'}", *MODES[mode]]
    if instruction_sets() is X86:
        common.append("-DBYOL_X86=1")
    jobs = {name: [str(ROOT / path)] for name, path in SOURCES.items()}
    for name, vector_bytes, tile_rows, flags in instruction_sets():
        macros = [f"-DBYOL_ISA={name}", f"-DBYOL_VECTOR_BYTES={vector_bytes}", f"-DBYOL_TILE_ROWS={tile_rows}"]
        jobs[name] = [str(ROOT / "csrc/cpu/kernels.cpp"), *macros, *flags.split()]
    objects = {name: str(folder / f"{name}.o") for name in jobs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: subprocess.run([*common, *jobs[name], "-c", "-o", objects[name]], check=True), jobs))
    program = folder / "fuzz"
    subprocess.run([*common, *objects.values(), "-ldl", "-lpthread", "-o", str(program)], check=True)
    return program


SOURCES = {
    "fuzz": "tests/native/fuzz.cpp",
    "dispatch": "csrc/cpu/dispatch.cpp",
    "parallel": "csrc/cpu/parallel.cpp",
}


def runnable(program: Path) -> list[str]:
    """The instruction sets that this processor has, as the dispatcher lists them."""
    refusal = subprocess.run([program, "0", "0"], env={**os.environ, "BYOL_FAST_CPU": "?"}, capture_output=True, text=True)
    return refusal.stderr.partition("expected one of ")[2].partition(" on this")[0].split(", ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--cases", type=int, default=300, metavar="N")
    options = parser.parse_args()
    program = build(options.mode, ROOT / "build" / f"fuzz-{options.mode}")
    failures = 0
    for name in runnable(program):
        command = [str(program), str(options.first), str(options.cases)]
        failures += subprocess.run(command, env={**os.environ, "BYOL_FAST_CPU": name}).returncode != 0
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
