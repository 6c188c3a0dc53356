"""What is measured: an operation at a shape, in a dtype, and every way of computing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from contract import make_operands
from torch import Tensor

import byol_fast as bf

from . import peers

OURS = "byol_fast"
WEIGHTS = ("encoder_weight", "decoder_weight", "encoder_bias", "decoder_bias")

# Computes once; returns the output, then the gradients.
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Operation:
    """What the user writes with the package, what without it, and what is to be had from either."""

    title: str
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    # The tensors whose gradients are wanted.
    needs: tuple[str, ...] = ()
    # The least arithmetic, in units of N·D·K, and the least traffic, in elements of an N×D matrix.
    arithmetic: int = 0
    traffic: int = 1
    # Peers that differentiate by hand.
    manual: dict[str, Callable[..., Sequence[Tensor]]] = field(default_factory=dict)
    compiled: bool = True
    sparse: bool = False
    tied: bool = False


_STEP = {"chunked": peers.chunked, "gram": peers.gram}
_LOSS = {name: partial(peer, gradients=False) for name, peer in _STEP.items()}

OPERATIONS = {
    "step": Operation(
        "Training step: loss and gradients of all weights and biases",
        bf.bottleneck_mse_loss, peers.loss, WEIGHTS, arithmetic=8, manual=_STEP,
    ),
    "tied": Operation(
        "Training step, tied weights",
        bf.bottleneck_mse_loss, peers.loss, WEIGHTS, arithmetic=4, manual=_STEP, tied=True,
    ),
    "sparse": Operation(
        "Training step on a sparse input (CSR, 1 % of the elements stored)",
        bf.bottleneck_mse_loss, peers.loss, WEIGHTS, manual={"gram": peers.gram}, compiled=False, sparse=True,
    ),
    "loss": Operation(
        "Loss only", bf.bottleneck_mse_loss, peers.loss, arithmetic=4, manual=_LOSS,
    ),
    "layer": Operation(
        "Layer, forward", bf.bottleneck, peers.bottleneck, arithmetic=4, traffic=2,
    ),
    "layer_backward": Operation(
        "Layer, forward and backward (input, weights and biases)",
        bf.bottleneck, peers.bottleneck, ("input", *WEIGHTS), arithmetic=12, traffic=5,
    ),
    "mse": Operation(
        "Squared error, forward", bf.mse_loss, F.mse_loss, traffic=2,
    ),
    "mse_backward": Operation(
        "Squared error, forward and backward", bf.mse_loss, F.mse_loss, ("input",), traffic=5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An operation at a shape, in a dtype; ``ratio`` is about the share of the input that the bottleneck misses."""

    operation: str
    rows: int
    features: int
    rank: int = 0
    dtype: torch.dtype = torch.float32
    ratio: float = 1.0
    memory: bool = False

    @property
    def id(self) -> str:
        shape = f"{self.rows}x{self.features}" + (f"x{self.rank}" if self.rank else "")
        missed = "" if self.ratio == 1 else f"-missed{self.ratio:g}"
        return f"{self.operation}-{str(self.dtype).removeprefix('torch.')}-{shape}{missed}"

    def tensors(self) -> dict[str, Tensor]:
        """The arguments, by name; the same ones each time."""
        torch.manual_seed(0)
        operation = OPERATIONS[self.operation]
        if operation.arithmetic == 0 and not operation.sparse:
            return {name: torch.randn(self.rows, self.features).to(self.dtype) for name in ("input", "target")}
        if operation.sparse:
            # Of the dense operands, which would not fit, only the weights are made.
            operands = make_operands(1, self.features, self.rank, out_features=self.features, target=True)
            weights = {name: getattr(operands, name) for name in WEIGHTS}
            return {"input": _sparse_rows(self.rows, self.features), **weights}
        operands = make_operands(
            self.rows, self.features, self.rank, dtype=self.dtype, tied=operation.tied, ratio=self.ratio
        )
        # As nn.Linear holds its weights.
        return {name: tensor.contiguous() for name, tensor in operands.present().items()}

    def cotangent(self) -> Tensor | None:
        """The gradient that arrives at the output; None where that is a scalar."""
        if self.operation != "layer_backward":
            return None
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.rows, self.features, generator=generator).to(self.dtype)

    def truth(self, tensors: dict[str, Tensor]) -> Sequence[Tensor]:
        """Output and gradients in float64 from the same rounded tensors."""
        cotangent = self.cotangent()
        cotangent = None if cotangent is None else cotangent.double()
        doubles = {name: tensor.double() for name, tensor in tensors.items()}
        operation = OPERATIONS[self.operation]
        return _differentiated(operation.eager, doubles, operation.needs, cotangent)()

    def variants(self, tensors: dict[str, Tensor]) -> dict[str, Run]:
        """Every way of computing the case; ours is the last."""
        operation = OPERATIONS[self.operation]
        differentiated = partial(_differentiated, tensors=tensors, needs=operation.needs, cotangent=self.cotangent())
        runs = {"eager": differentiated(operation.eager)}
        if operation.compiled:
            # A fresh start, so that no case is compiled for the shapes of another.
            torch.compiler.reset()
            runs["compiled"] = differentiated(torch.compile(operation.eager, fullgraph=True, dynamic=False))
        runs |= {name: torch.no_grad()(partial(peer, **tensors)) for name, peer in operation.manual.items()}
        return runs | {OURS: differentiated(operation.ours)}

    def outputs(self, tensors: dict[str, Tensor]) -> list[str]:
        """Names of what a run returns."""
        return ["output", *(f"d_{name}" for name in OPERATIONS[self.operation].needs if name in tensors)]


def _differentiated(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], needs: Sequence[str], cotangent: Tensor | None
) -> Run:
    leaves = {name: tensor.detach().requires_grad_(name in needs) for name, tensor in tensors.items()}
    wanted = [leaves[name] for name in needs if name in leaves]

    def run() -> Sequence[Tensor]:
        with torch.set_grad_enabled(bool(wanted)):
            output = function(**leaves)
            gradients = torch.autograd.grad(output, wanted, cotangent) if wanted else ()
        return output, *gradients

    return run


def _sparse_rows(rows: int, features: int, density: float = 0.01) -> Tensor:
    stored = max(1, round(density * features))
    columns = torch.rand(rows, features).topk(stored, dim=1).indices.sort(dim=1).values
    starts = torch.arange(0, rows * stored + 1, stored)
    return torch.sparse_csr_tensor(starts, columns.flatten(), torch.rand(rows * stored), (rows, features))


def _both(operation: str, *shape: int, **options: bool) -> list[Case]:
    return [Case(operation, *shape, dtype=dtype, **options) for dtype in (torch.float32, torch.bfloat16)]


CASES = [
    *_both("step", 8192, 1024, 16),
    *_both("step", 8192, 1024, 64, memory=True),
    *_both("step", 8192, 1024, 256),
    Case("step", 4096, 4096, 128, memory=True),
    *_both("step", 65536, 256, 32),
    Case("step", 512, 768, 64),
    # Where the margin must shrink: wide codes, few rows, a bottleneck that misses almost nothing.
    Case("step", 8192, 1024, 4),
    Case("step", 8192, 1024, 512),
    Case("step", 4096, 256, 256),
    Case("step", 8, 1024, 64),
    Case("step", 64, 1024, 64),
    Case("step", 8192, 1024, 64, ratio=1e-4),
    *_both("tied", 8192, 1024, 64),
    Case("sparse", 2048, 20000, 128, memory=True),
    *_both("loss", 8192, 1024, 64),
    Case("loss", 65536, 256, 32),
    *_both("layer", 8192, 1024, 16),
    *_both("layer", 8192, 1024, 64),
    Case("layer", 8192, 1024, 256),
    Case("layer", 65536, 256, 32),
    Case("layer", 1, 1024, 64),
    Case("layer", 16, 1024, 64),
    Case("layer", 64, 1024, 64),
    *_both("layer_backward", 8192, 1024, 64),
    Case("layer_backward", 64, 1024, 64),
    *_both("mse", 32768, 1024),
    Case("mse", 64, 1024),
    *_both("mse_backward", 32768, 1024),
]  # fmt: skip

QUICK = [
    *_both("step", 512, 256, 16, memory=True),
    Case("tied", 512, 256, 16),
    Case("sparse", 64, 2000, 16),
    Case("loss", 512, 256, 16),
    Case("layer", 16, 256, 16),
    Case("layer_backward", 64, 256, 16),
    Case("mse", 512, 256),
    Case("mse_backward", 512, 256),
]
