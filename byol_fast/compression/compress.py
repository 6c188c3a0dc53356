"""compress: a whole model made smaller, and faster where that is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .build import Workpiece
from .calibration import Calibration, output_error
from .find import Choice, Site, chosen
from .gate import Gate, timed
from .kinds import Factors
from .ranks import Ranked, Ranks
from .recover import Recovery, recover
from .report import CompressionReport, LayerReport
from .sequential import refit

__all__ = ["compress"]


def compress(
    model: nn.Module,
    calibration: Any,
    *,
    keep: float | None = None,
    error: float | None = None,
    latency: float | None = None,
    method: str = "data_aware",
    allocation: str = "output",
    sequential: bool = False,
    gate: str = "latency",
    margin: float = 0.05,
    include: Choice = None,
    exclude: Choice = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batch_size: int = 32,
    recovery: Recovery | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[nn.Module, CompressionReport]:
    """A copy of a trained model with bottlenecks in place of the layers where they pay, and a report.

    Looked at are ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding``, the projections of ``nn.MultiheadAttention``, and
    transformers' ``Conv1D``. Every other layer stays, and so does one of these where the report says why. Weights that
    layers share stay shared. The model is calibrated in evaluation mode; the copy has the modes of the model, which is
    not modified.

    Each weight is replaced by the factors that cost the *output of the model* least, to first order, by statistics of
    the layer's inputs and of the gradients of the output; ranks go where they save most of that error for their cost
    (see ``byol_fast/compression/statistics.py`` and ``factorize.py``).

    Args:
        model: any model, trained.
        calibration: a few batches as in use: a tensor or array of rows, or an iterable of batches, such as a list or a
            DataLoader. A batch that is a tuple or list holds positional arguments of the model, a mapping keyword
            arguments. Hundreds of samples do. None, with ``method="svd"`` and ``gate="none"``, uses no data.
        keep: share of the weights of the layers that can be replaced that may be left; 0.5 if neither ``error`` nor
            ``latency`` is given.
        error: the largest ‖f − f′‖ / ‖f‖ of the model's output over the calibration data, before recovery; the smallest
            model that keeps it is looked for.
        latency: milliseconds that a batch like the first may take; ranks are then given by error per millisecond.
        method: ``"data_aware"``, or ``"svd"`` for the plain truncated SVD of each weight.
        allocation: ``"output"``, as described, or ``"uniform"`` for the same share of each layer, as with ``"svd"``.
        sequential: fit each layer again, to the dense layer's outputs, on the inputs that it gets in the compressed
            model, in the order of calls; costs two passes over the data for each layer or group of layers with one
            input.
        gate: ``"latency"``: a layer is replaced only where its bottleneck measures faster on this machine, at the first
            batch's shape, dtype and autocast; and the whole only if it measures faster. ``"none"``: no time is taken.
        margin: of its time that a layer has to save, to pass the gate.
        include, exclude: names of modules (each means everything inside of it) or a predicate ``(name, module)``.
        forward: ``forward(model, batch)`` → what counts of the output; by default, all floating-point tensors that the
            model returns.
        batch_size: rows of a batch where ``calibration`` is a tensor or array.
        recovery: a :class:`byol_fast.Recovery`; None means no training.
        seed: of the random directions of the gradients.
        progress: show progress where training takes time.

    Returns:
        The compressed copy and a :class:`byol_fast.CompressionReport`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check(model, calibration, keep, error, latency, method, allocation, gate, margin)
    # What is made here is to be trained later, wherever it is made.
    with torch.inference_mode(False), torch.enable_grad():
        work = Workpiece(model, chosen(include, exclude))
        ranks = Ranks(work.sites, work.refusals, Gate(margin) if gate == "latency" else None)
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            ranks.refuse(ranks.sites, "parts of the model are on the meta device: it cannot be calibrated")
        data = None if calibration is None else Calibration(calibration, batch_size, forward, _device(model))
        if ranks.sites and data is not None:
            ranks.calibrate(work.dense, data, seed, sequential)
        ranks.decompose(method)
        # The energies of weights say nothing of the output: plain factors get equal shares.
        allocation = "uniform" if method == "svd" else allocation
        if error is not None and data is not None:
            taken = _for_error(work, ranks, data, error, allocation)
        elif latency is not None and data is not None:
            taken = ranks.for_milliseconds(latency, _milliseconds(data, work.as_given())[0])
        else:
            taken = ranks.for_weights(keep or 0.5, allocation)
        asked = ranks.asked(keep or 0.5) if latency is None and error is None else {}
        return _Result(work, ranks, data, asked).finished(taken, sequential, recovery, progress)


def _for_error(work: Workpiece, ranks: Ranks, data: Calibration, error: float, allocation: str) -> Ranked:
    """The smallest budget whose model keeps the error, by bisection; every model on the way is measured."""
    low, high = 0.0, 1.0
    best: Ranked = dict.fromkeys(ranks.sites)
    while high - low > 0.01:
        middle = (low + high) / 2
        taken = ranks.for_weights(middle, allocation)
        if output_error(data, work.dense, work.build(_cuts(ranks, taken))[0]) <= error:
            high, best = middle, taken
        else:
            low = middle
    return best


def _cuts(ranks: Ranks, taken: Ranked) -> dict[Site, Factors]:
    return {site: ranks.decompositions[site].cut(rank) for site, rank in taken.items() if rank is not None}


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@torch.no_grad()
def _milliseconds(data: Calibration, *models: nn.Module) -> list[float]:
    """What each model takes for the first batch, measured in turn."""
    batch = data.first()

    def caller(model: nn.Module) -> Callable[[], object]:
        return lambda: data.forward(model, batch)

    return timed(*map(caller, models), device=data.device, seconds=2.0)


class _Result:
    """From ranks to the model and its report."""

    def __init__(self, work: Workpiece, ranks: Ranks, data: Calibration | None, asked: Ranked) -> None:
        self.work = work
        self.ranks = ranks
        self.data = data
        self.asked = asked

    def finished(
        self, taken: Ranked, sequential: bool, recovery: Recovery | None, progress: bool
    ) -> tuple[nn.Module, CompressionReport]:
        """Build the model, train it, judge it as a whole, and report."""
        cuts = _cuts(self.ranks, taken)
        if not cuts:
            return copy.deepcopy(self.work.original), self._report(taken, copy.deepcopy(self.work.original), 0.0)
        if sequential and self.data is not None:
            cuts = refit(self.work.dense, cuts, self.ranks.statistics, self.data, self.work.build)
        model, places = self.work.build(cuts)
        dense_ms = ms = None
        if self.ranks.gate is not None and self.data is not None:
            dense_ms, ms = _milliseconds(self.data, self.work.as_given(), model)
            if ms >= dense_ms:
                return self._unchanged(taken, dense_ms, ms)
        error, before, history = float("nan"), None, []
        if self.data is not None:
            error = output_error(self.data, self.work.dense, model)
            if recovery is not None:
                data = self.data if recovery.data is None else self.data.like(recovery.data)
                history = recover(
                    model, self.work.dense, list(cuts), places, list(data), data.forward, recovery, progress
                )
                before, error = error, output_error(self.data, self.work.dense, model)
        report = self._report(taken, model, error)
        report.error_before_recovery, report.history = before, history
        report.dense_ms, report.ms = dense_ms, ms
        return self.work.with_modes(model), report

    def _unchanged(self, taken: Ranked, dense_ms: float, ms: float) -> tuple[nn.Module, CompressionReport]:
        reason = f"the whole model would take {ms:.2f} ms a batch, with its dense layers it takes {dense_ms:.2f} ms"
        self.ranks.refuse(list(taken), reason)
        model = copy.deepcopy(self.work.original)
        report = self._report({}, model, 0.0)
        report.dense_ms = report.ms = dense_ms
        return model, report

    def _report(self, taken: Ranked, model: nn.Module, error: float) -> CompressionReport:
        # A site may have been refused on the way.
        layers = [self._layer(site, rank) for site, rank in taken.items() if site in self.ranks.sites]
        layers += [LayerReport(r.name, r.kind, r.size, reason=r.reason) for r in self.ranks.refusals]
        order = {name: index for index, (name, _) in enumerate(self.work.dense.named_modules())}
        layers.sort(key=lambda layer: order.get(layer.name.split(" ")[0], -1))
        before, after = (sum(p.numel() for p in m.parameters()) for m in (self.work.original, model))
        return CompressionReport(layers, before, after, error)

    def _layer(self, site: Site, rank: int | None) -> LayerReport:
        report = LayerReport(site.name, site.kind.title, site.size)
        times = self.ranks.measured(site, rank)
        if times is not None:
            report.dense_ms, report.ms = times
        if rank is None:
            asked, limit = self.asked.get(site), self.ranks.limits[site]
            wanted = "dense by the budget" if asked is None else f"asked {asked}"
            report.reason = f"break-even rank {limit}, {wanted}"
            return report
        report.rank = rank
        report.kept = rank * site.unit / site.size
        report.error = 1 - float(self.ranks.decompositions[site].kept[rank])
        return report


def _check(
    model: Any,
    calibration: Any,
    keep: float | None,
    error: float | None,
    latency: float | None,
    method: str,
    allocation: str,
    gate: str,
    margin: float,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    goals = {"keep": keep, "error": error, "latency": latency}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) > 1:
        raise TypeError(f"compress: expected at most one of keep, error, latency, got {', '.join(given)}")
    for name, value in given.items():
        if not value > 0 or (name == "keep" and value > 1):
            raise ValueError(f"{name}: expected a number {'in (0, 1]' if name == 'keep' else '> 0'}, got {value}")
    choices = {
        "method": (method, ("data_aware", "svd")),
        "allocation": (allocation, ("output", "uniform")),
        "gate": (gate, ("latency", "none")),
    }
    for name, (choice, known) in choices.items():
        if choice not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {choice!r}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin: expected a number in [0, 1), got {margin}")
    if latency is not None and gate == "none":
        raise ValueError('gate: expected "latency" with latency=…, got "none"')
    if calibration is None and (method != "svd" or gate != "none" or error is not None):
        raise ValueError('calibration: expected data, or method="svd", gate="none" and keep=…, got None')
