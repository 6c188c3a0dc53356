"""What one rank does to one matrix: yield reached, best yield, and the time of a training step beside eager PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..curve import YieldCurve
from ..functional import explain
from ..nn import Bottleneck
from ..pca import StreamingPCA
from ..phases import pretrain

__all__ = ["RankResult", "curve_of", "measured_yield", "result_at"]

_BATCH = 8192
_ROUNDS = 9


@dataclass
class RankResult:
    """One line of the table; None where a column does not apply."""

    data: str
    rank: int
    parameter_share: float
    yielded: float
    best: float
    eager_ms: float
    ours_ms: float
    backend: str
    dense_accuracy: float | None = None
    accuracy: float | None = None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def curve_of(rows: Tensor) -> YieldCurve:
    """The best possible yield at every rank, from one pass over the rows."""
    pca = StreamingPCA(rows.shape[1])
    for batch in rows.split(_BATCH):
        pca.partial_fit(batch)
    return pca.curve()


def result_at(name: str, rows: Tensor, rank: int, curve: YieldCurve) -> tuple[RankResult, Bottleneck]:
    """Pre-train a bottleneck of this rank on the rows and measure it."""
    features = rows.shape[1]
    layer = Bottleneck(features, rank)
    pretrain(layer, rows)
    reached = measured_yield(layer, rows, curve)
    batch = rows[:_BATCH].to(torch.float32)
    eager, ours = step_times(layer, batch)
    backend = explain(batch, layer.encoder.weight, layer.decoder.weight).backend
    # Of the weights of a dense layer with as many inputs and outputs.
    share = 2 * rank / features
    print(f"  rank {rank:4}: yield {reached:.2%}, best possible {curve.yield_at(rank):.2%}")
    return RankResult(name, rank, share, reached, curve.yield_at(rank), eager * 1e3, ours * 1e3, backend), layer


@torch.no_grad()
def measured_yield(layer: Bottleneck, rows: Tensor, curve: YieldCurve) -> float:
    """1 − achieved loss / variance, the loss taken over all rows through the layer itself."""
    batches = [batch.to(torch.float32) for batch in rows.split(_BATCH)]
    error = sum(float(layer.reconstruction_loss(batch)) * len(batch) for batch in batches) / len(rows)
    return 1 - error / float(curve.errors[0])


def step_times(layer: Bottleneck, batch: Tensor) -> tuple[float, float]:
    """Seconds of one training step, loss and all gradients, in eager PyTorch and through the fused loss: medians.

    The two take turns, so that whatever else the machine does hits both.
    """
    parameters = list(layer.parameters())

    def eager() -> Tensor:
        code = F.linear(batch, layer.encoder.weight, layer.encoder.bias)
        return F.mse_loss(F.linear(code, layer.decoder.weight, layer.decoder.bias), batch)

    def ours() -> Tensor:
        return layer.reconstruction_loss(batch)

    seconds: dict[Callable[[], Tensor], list[float]] = {eager: [], ours: []}
    for turn in range(_ROUNDS + 1):
        for loss, samples in seconds.items():
            start = time.perf_counter()
            torch.autograd.grad(loss(), parameters)
            # The first turn warms up.
            if turn:
                samples.append(time.perf_counter() - start)
    return statistics.median(seconds[eager]), statistics.median(seconds[ours])
