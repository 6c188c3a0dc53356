"""``python -m bench.gpu.sanitize``: the CUDA kernels on small sizes under each tool of compute-sanitizer.

Exits with 1 if a tool finds an error, a result is far from the reference's, or there is nothing to run.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import byol_fast as bf
from byol_fast import reference

from .device import DEVICE, REHEARSAL, available

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Rows, features, rank: ragged, in whole tiles, and, in half precision, of one and of two blocks of a cluster.
# With tied weights, too, of which the second has a rank of one pass.
SHAPES = [(70, 83, 13), (129, 64, 64), (65, 131, 100), (130, 256, 32), (130, 520, 32)]
if REHEARSAL:
    SHAPES = [(33, 35, 5), (65, 72, 8)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> int:
    if "--child" in sys.argv:
        available()
        return _child()
    failed = [words for words in map(_error, TOOLS) if words is not None]
    print("\n".join(failed or ["no tool found an error"]))
    return 1 if failed else 0


def _error(tool: str) -> str | None:
    try:
        sanitize(tool)
    except RuntimeError as error:
        return str(error)
    return None


def sanitize(tool: str, seconds: float | None = None) -> None:
    """Runs the kernels under a tool, or, in a rehearsal, under none.

    Raises:
        RuntimeError: it found an error or did not finish, or there is no compute-sanitizer or nothing to run under it.
    """
    status = bf.backends()["cuda"]
    if not status.available:
        raise RuntimeError(f"there is nothing to sanitize: cuda is {status}")
    command = [sys.executable, "-m", "bench.gpu.sanitize", "--child"]
    if not REHEARSAL:
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(found).exists():
            raise RuntimeError("compute-sanitizer is not installed")
        command = [found, f"--tool={tool}", "--error-exitcode=1", *command]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{tool}: not finished in {seconds:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"{tool}: {(done.stdout + done.stderr).strip()[-1500:] or f'exit status {done.returncode}'}")


def _child() -> int:
    """Every operation of the backend once; 1 if one is wrong by more than rounding."""
    torch.manual_seed(0)
    wrong = 0
    for dtype in DTYPES:
        for (rows, features, rank), tied in itertools.product(SHAPES, (False, True)):
            sizes = ((rows, features), (rank, features), (features, rank), (rank,), (features,))
            tensors = [torch.randn(*size, device=DEVICE, dtype=dtype) for size in sizes]
            for operation in ("bottleneck_mse_loss", "bottleneck"):
                with bf.use_backend("cuda"):
                    got = _results(getattr(bf, operation), tensors, tied)
                expected = _results(getattr(reference, operation), [tensor.double() for tensor in tensors], tied)
                for one, other in zip(got, expected, strict=True):
                    error = ((one.double() - other).norm() / other.norm()).item()
                    if not error < 0.05:
                        words = "tied" if tied else "untied"
                        print(f"{operation}, {words}, {dtype}, {(rows, features, rank)}: relative error {error:.1e}")
                        wrong = 1
    return wrong


def _results(function, tensors, tied):  # type: ignore[no-untyped-def]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    encode, decode = leaves[:2], leaves[3:]
    output = function(*encode, None if tied else leaves[2], *decode, activation="tanh")
    return [output.detach(), *torch.autograd.grad(output.sum(), encode + decode if tied else leaves)]


if __name__ == "__main__":
    sys.exit(main())
