"""How fast each backend is beside what PyTorch offers, in time and peak memory, and how near the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from contract import Operands, make_operands

import byol_fast as bf
from byol_fast.backends import Call, verified
from byol_fast.backends.cuda import Cuda

from .. import peers
from .checks import WEIGHTS, capture
from .device import DEVICE, REHEARSAL, extra_bytes, microseconds

Run = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """An operation at a shape, in a dtype."""

    operation: str
    rows: int
    features: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    tied: bool = False

    @property
    def id(self) -> str:
        shape = f"{self.rows}x{self.features}" + (f"x{self.rank}" if self.rank > 1 else "")
        return f"{self.operation}{'-tied' if self.tied else ''}-{str(self.dtype).removeprefix('torch.')}-{shape}"

    def call_class(self) -> str:
        operation = {"step": "bottleneck_mse_loss", "layer": "bottleneck", "mse": "mse_loss"}[self.operation]
        rows = self.rows * self.features if operation == "mse_loss" else self.rows
        return verified.call_class(Call(operation, self.dtype, rows, self.features, self.features, self.rank))


_N = 65536
# Most telling first: what is not reached when the time is up is reported so.
CASES = [
    *(Case("step", _N, 1024, rank) for rank in (64, 16, 128, 256, 32)),
    *(Case("step", _N, 4096, rank) for rank in (64, 16, 128)),
    Case("step", 8192, 1024, 64),
    *(Case("step", _N, 1024, rank, tied=True) for rank in (64, 16)),
    *(Case("step", _N, 1024, rank, torch.float32) for rank in (64, 16, 128)),
    *(Case("step", _N, 1024, rank, torch.float16) for rank in (64, 16)),
    Case("layer", _N, 1024, 64),
    Case("layer", _N, 1024, 16),
    Case("mse", 32768, 1024, 1),
    Case("step", 1024, 1024, 64),
    Case("mse", 32768, 1024, 1, torch.float32),
]  # fmt: skip
REHEARSED = [Case("step", 96, 64, 16), Case("layer", 64, 48, 16, torch.float32), Case("mse", 64, 64, 1)]
# Compiling takes tens of seconds: only where the goals are set.
COMPILED = {"step-bfloat16-65536x1024x64", "step-bfloat16-65536x1024x16", "step-bfloat16-65536x1024x128",
            "step-bfloat16-65536x1024x256", "step-bfloat16-8192x1024x64", REHEARSED[0].id}  # fmt: skip


def floor_us(case: Case, bytes_per_s: float, operations_per_s: float) -> float | None:
    """The sum over the two passes of the larger of traffic and arithmetic; None for other operations."""
    if case.operation != "step":
        return None
    size, half = case.dtype.itemsize, case.dtype != torch.float32
    n, d, k = case.rows, case.features, case.rank
    traffic = n * d * size + 2 * n * k * size
    passes = [(2 if case.tied else 4) * n * d * k, 4 * n * d * k + 2 * n * k * k]
    peak = operations_per_s if half else operations_per_s / 12
    return 1e6 * sum(max(traffic / bytes_per_s, operations / peak) for operations in passes)


def contenders(case: Case, backends: list[str]) -> dict[str, Callable[[], Run]]:
    """What is timed, by name; each is made when its turn comes, since making it may fail."""
    torch.manual_seed(0)
    if case.operation == "mse":
        x, t = (torch.randn(case.rows, case.features, dtype=case.dtype, device=DEVICE) for _ in range(2))
        x.requires_grad_()
        eager, ours = (_differentiated(function, [x, t], [x]) for function in (F.mse_loss, bf.mse_loss))
        made: dict[str, Callable[[], Run]] = {"eager": lambda: eager}
        return made | {name: lambda name=name: _with_backend(name, ours) for name in backends}  # type: ignore[misc]
    operands = _operands(case)
    present = operands.present()
    leaves = [present[name] for name in WEIGHTS if name in present]
    arguments = list(present.values())
    names = list(present)
    eager_function = peers.loss if case.operation == "step" else peers.bottleneck
    our_function = bf.bottleneck_mse_loss if case.operation == "step" else bf.bottleneck

    def named(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *values: function(**dict(zip(names, values, strict=True)))

    eager = _differentiated(named(eager_function), arguments, leaves)
    ours = _differentiated(named(our_function), arguments, leaves)
    made = {"eager": lambda: eager}
    if case.operation == "step" and case.dtype != torch.float32:
        full = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in arguments]
        wanted = [tensor for tensor in full if tensor.requires_grad]
        made["eager, autocast"] = lambda: _autocast(_differentiated(named(eager_function), full, wanted), case.dtype)
    if case.id in COMPILED:
        for words, mode in _MODES.items():
            made[words] = lambda mode=mode: _differentiated(  # type: ignore[misc]
                torch.compile(named(eager_function), mode=mode, fullgraph=True, dynamic=False), arguments, leaves
            )
    for name in backends:
        made[name] = lambda name=name: _with_backend(name, ours)  # type: ignore[misc]
        if not REHEARSAL and name != "gram":
            made[f"{name}, CUDA graph"] = lambda name=name: _replayed(_with_backend(name, ours))  # type: ignore[misc]
        if name == "cuda" and _single_pass(case):
            made["cuda, two passes"] = lambda: _in_two_passes(_with_backend("cuda", ours))
    return made


def _single_pass(case: Case) -> bool:
    return case.operation == "step" and case.dtype != torch.float32 and case.rank <= (64 if case.tied else 32)


_MODES = {
    "torch.compile": "default",
    "torch.compile, CUDA graphs": "reduce-overhead",
    "torch.compile, max-autotune": "max-autotune",
}


def _operands(case: Case) -> Operands:
    # Weights of a small problem of the same widths, rows made on the device: large ones take the CPU seconds.
    small = make_operands(max(case.rank, 64), case.features, case.rank, dtype=case.dtype, tied=case.tied)
    weights = {name: tensor.to(DEVICE).requires_grad_() for name, tensor in small.present().items()}
    weights["input"] = torch.randn(case.rows, case.features, dtype=case.dtype, device=DEVICE)
    return Operands(**weights)


def _differentiated(
    function: Callable[..., torch.Tensor], arguments: list[torch.Tensor], leaves: list[torch.Tensor]
) -> Run:
    cotangents: list[torch.Tensor] = []

    def run() -> list[torch.Tensor]:
        output = function(*arguments)
        if not cotangents:
            cotangents.append(torch.ones_like(output))
        return [output.detach(), *torch.autograd.grad(output, leaves, cotangents[0])]

    return run


def _with_backend(name: str, run: Run) -> Run:
    def chosen() -> list[torch.Tensor]:
        with bf.use_backend(name):
            return run()

    return chosen


def _in_two_passes(run: Run) -> Run:
    def without_clusters() -> list[torch.Tensor]:
        Cuda.single_pass = False
        try:
            return run()
        finally:
            Cuda.single_pass = True

    return without_clusters


def _autocast(run: Run, dtype: torch.dtype) -> Run:
    def cast() -> list[torch.Tensor]:
        with torch.autocast(DEVICE.type, dtype):
            return run()

    return cast


def _replayed(run: Run) -> Run:
    out, replay = capture(run)

    def replayed() -> list[torch.Tensor]:
        replay()
        return out

    return replayed


def measure(make: Callable[[], Run]) -> dict[str, float | int | None]:
    """Times and peak extra memory of one contender."""
    run = make()
    return {**microseconds(run), "extra_bytes": extra_bytes(run)}
