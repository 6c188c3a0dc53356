"""``python -m bench.gpu.sanitize``: the CUDA kernels on small sizes under each tool of compute-sanitizer.

Exits with 1 if a tool finds an error or a result is far from the reference's, with 2 where it can run on nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

import byol_fast as bf
from byol_fast import reference

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Rows, features, rank: ragged, in whole tiles, and, in half precision, of one and of two blocks of a cluster.
SHAPES = [(70, 83, 13), (129, 64, 64), (65, 131, 100), (130, 256, 32), (130, 520, 32)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> int:
    if "--child" in sys.argv:
        return _child()
    tool = shutil.which("compute-sanitizer")
    status = bf.backends()["cuda"]
    if tool is None or not status.available:
        print(f"nothing to sanitize: compute-sanitizer is {tool or 'not installed'}, cuda is {status}", file=sys.stderr)
        return 2
    failed = [name for name in TOOLS if _under(tool, name)]
    print(f"failed: {', '.join(failed)}" if failed else "no tool found an error")
    return 1 if failed else 0


def _under(tool: str, name: str) -> int:
    print(f"{name}:", flush=True)
    command = [tool, f"--tool={name}", "--error-exitcode=1", sys.executable, "-m", "bench.gpu.sanitize", "--child"]
    return subprocess.run(command, cwd=ROOT).returncode


def _child() -> int:
    """Every operation of the backend once; 1 if one is wrong by more than rounding."""
    torch.manual_seed(0)
    wrong = 0
    for dtype in DTYPES:
        for rows, features, rank in SHAPES:
            tensors = [
                torch.randn(*size, device="cuda", dtype=dtype).requires_grad_()
                for size in ((rows, features), (rank, features), (features, rank), (rank,), (features,))
            ]
            for operation in ("bottleneck_mse_loss", "bottleneck"):
                with bf.use_backend("cuda"):
                    got = _results(getattr(bf, operation), tensors)
                expected = _results(getattr(reference, operation), [tensor.double() for tensor in tensors])
                for one, other in zip(got, expected, strict=True):
                    error = ((one.double() - other).norm() / other.norm()).item()
                    if not error < 0.05:
                        print(f"{operation}, {dtype}, {(rows, features, rank)}: relative error {error:.1e}")
                        wrong = 1
    return wrong


def _results(function, tensors):  # type: ignore[no-untyped-def]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves, activation="tanh")
    return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]


if __name__ == "__main__":
    sys.exit(main())
