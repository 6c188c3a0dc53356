"""Compiles the kernels for GPUs that are not there, as they would be launched, and reads what they take.

``python tests/triton/offline.py --write`` writes resources.json, the bounds that test_offline.py holds the kernels to.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from byol_fast.backends.triton import launch

BOUNDS = Path(__file__).with_name("resources.json")
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = "gfx942"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = (16, 32, 64, 128)
# Bytes a program may have, on the smallest chip that the code for the architecture runs on (99 KB on sm_86 and sm_89).
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, AMD: 65_536}
# The instructions of matrix units, in machine code.
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "v_mfma")


@dataclass(frozen=True)
class Build:
    """A kernel as it is launched for a dtype and rank, on an architecture."""

    architecture: str
    dtype: str
    rank: int
    kernel: str

    def __str__(self) -> str:
        return f"{self.architecture} {self.dtype} {self.rank} {self.kernel}"


@dataclass(frozen=True)
class Resources:
    """What the compiler says: registers a thread, bytes of spills a thread, bytes of shared memory, matrix units."""

    registers: int
    spills: int
    shared: int
    instructions: tuple[str, ...]


def launches(dtype: str, rank: int) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Any]]:
    """Every launch of the backend for a dtype and rank, by name of the kernel; nothing runs."""
    recorded: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = {}

    def record(kernel: Any, grid: Any, configuration: Any, *arguments: Any, **options: Any) -> None:
        recorded[f"{kernel.__module__.rsplit('.', 1)[1]}.{kernel.__name__}"] = (
            kernel,
            arguments,
            options,
            configuration,
        )

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[dtype])

    x, encoder, decoder = tensor(4096, 1024), tensor(rank, 1024), tensor(1024, rank)
    encoder_bias, decoder_bias, code, scale = tensor(rank), tensor(1024), torch.empty(4096, rank), torch.empty(())
    weights = (encoder, decoder, encoder_bias, decoder_bias)
    run, launch._run = launch._run, record
    try:
        launch.step(x, None, *weights, "gelu", False, False)
        launch.step(x, None, *weights, "gelu", True, False)
        launch.forward(x, *weights, "gelu", True, True)
        launch.data_gradients(x, None, encoder, decoder, decoder_bias, code, code, scale, (True, False))
        launch.squared_error_sum(x, x)
        launch.squared_error_gradients(x, x, scale, (True, True))
        launch.backward(x, x, encoder, decoder, code, "gelu", True, True, False)
    finally:
        launch._run = run
    return recorded


def builds(architectures: tuple[str, ...]) -> Iterator[Build]:
    """Every kernel × dtype × rank × architecture; those without a rank once for each dtype."""
    for dtype, rank, kernel in _kernels():
        yield from (Build(architecture, dtype, rank, kernel) for architecture in architectures)


def covering() -> Iterator[Build]:
    """Every kernel × dtype × rank on one architecture, in turns, so that each kernel meets all: what CI compiles."""
    for place, (dtype, rank, kernel) in enumerate(_kernels()):
        turn = list(DTYPES).index(dtype) + RANKS.index(rank) + place
        yield Build(NVIDIA[turn % len(NVIDIA)], dtype, rank, kernel)


def _kernels() -> Iterator[tuple[str, int, str]]:
    for dtype in DTYPES:
        for rank in RANKS:
            for kernel in launches(dtype, rank):
                if rank == RANKS[0] or "rank" in _parameters(kernel, dtype, rank):
                    yield dtype, rank, kernel


def _parameters(kernel: str, dtype: str, rank: int) -> list[str]:
    return list(launches(dtype, rank)[kernel][0].arg_names)


def build(what: Build) -> Resources:
    """Compiles, with Triton's own rules for which arguments are constants or divisible by 16."""
    kernel, arguments, options, configuration = launches(what.dtype, what.rank)[what.kernel]
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[place] if place < len(arguments) else options[name]
        if place >= len(arguments) or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
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


_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}


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
    """Calls ``done`` with the resources of each build, or the error it ended in; two at a time."""
    with ProcessPoolExecutor(2) as pool:
        for one, result in zip(what, pool.map(_attempt, what), strict=True):
            done(one, result)


def _attempt(what: Build) -> Resources | str:
    try:
        return build(what)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def bounds() -> dict[str, dict[str, Any]]:
    """What was committed, by build."""
    committed: dict[str, dict[str, Any]] = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    return committed


def complaint(what: Build, found: Resources | str) -> str | None:
    """None, or what is wrong with a build: it failed, spills more than before, does not fit, lost the matrix unit."""
    if isinstance(found, str):
        return f"{what}: {found}"
    bound = bounds().get(str(what))
    if bound is None:
        return f"{what}: resources.json says nothing of it"
    if found.spills > bound["spills"]:
        return f"{what}: {found.spills} bytes of spills, {bound['spills']} are allowed"
    if found.shared > SHARED[what.architecture]:
        return f"{what}: {found.shared} bytes of shared memory, the chip has {SHARED[what.architecture]}"
    missing = set(bound["instructions"]) - set(found.instructions)
    if _wants_matrix_unit(what) and not found.instructions:
        missing.add("those of a matrix unit")
    return f"{what}: no instructions {sorted(missing)}" if missing else None


def _wants_matrix_unit(what: Build) -> bool:
    """float32 may not be rounded and does without; the squared error and the last sum multiply no matrices."""
    return what.dtype != "fp32" and not what.kernel.startswith(("squared_error", "collect.add_up"))


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write what is found to resources.json")
    parser.add_argument("--architectures", nargs="+", default=[*NVIDIA, AMD])
    parser.add_argument("--only", default="", help="builds whose name contains this")
    options = parser.parse_args()
    started, complaints, table = time.time(), [], bounds()

    def done(one: Build, result: Resources | str) -> None:
        print(f"{one}: {result}", flush=True)
        if options.write and isinstance(result, Resources):
            table[str(one)] = vars(result)
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table))
            BOUNDS.write_text(f"{{\n{lines}\n}}\n")
        found = complaint(one, result)
        if found is not None:
            complaints.append(found)

    wanted = [one for one in builds(tuple(options.architectures)) if options.only in str(one)]
    build_all(wanted, done)
    print("\n".join([f"{len(wanted)} builds in {time.time() - started:.0f} s", *complaints]))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(_main())
