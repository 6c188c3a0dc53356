"""What compression learns of a model from its calibration data, once; models of any budget follow."""

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
from .ranks import Ranked, Ranks
from .recover import Recovery, recover
from .report import CompressionReport, LayerReport
from .sequential import refit
from .yields import Yields

__all__ = ["Analysis", "check_goal"]


class Analysis:
    """A model analysed: its calibration pass, which :func:`byol_fast.compress` takes most of its time for, done once.

    ::

        analysis = Analysis(model, batches)
        for keep in (0.8, 0.6, 0.5):
            smaller, report = analysis.compress(keep=keep)

    Args:
        model, calibration, method, sequential, gate, margin, include, exclude, forward, batch_size, seed: as those of
            :func:`byol_fast.compress`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Any,
        *,
        method: str = "data_aware",
        sequential: bool = False,
        gate: str = "latency",
        margin: float = 0.05,
        include: Choice = None,
        exclude: Choice = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        _check(model, calibration, method, gate, margin)
        self._method = method
        self._sequential = sequential
        # What is made here is to be trained later, wherever it is made.
        with torch.inference_mode(False), torch.enable_grad():
            self._work = Workpiece(model, chosen(include, exclude))
            ranks = Ranks(self._work.sites, self._work.refusals, Gate(margin) if gate == "latency" else None)
            if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
                ranks.refuse(ranks.sites, "parts of the model are on the meta device: it cannot be calibrated")
            data = None if calibration is None else Calibration(calibration, batch_size, forward, _device(model))
            if ranks.sites and data is not None:
                ranks.calibrate(self._work.dense, data, seed, sequential)
            ranks.decompose(method)
        self._ranks = ranks
        self._data = data

    def compress(
        self,
        *,
        keep: float | None = None,
        error: float | None = None,
        latency: float | None = None,
        allocation: str = "measured",
        recovery: Recovery | None = None,
        progress: bool = True,
    ) -> tuple[nn.Module, CompressionReport]:
        """A compressed copy of the model and its report: arguments and results are those of :func:`byol_fast.compress`.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_goal(self._data, keep, error, latency, allocation, "none" if self._ranks.gate is None else "latency")
        with torch.inference_mode(False), torch.enable_grad():
            # Of its own, because layers may be refused on the way to this one model.
            ranks = self._ranks.copy()
            # The energies of weights say nothing of the output: plain factors get equal shares.
            allocation = "uniform" if self._method == "svd" else allocation
            goal = _Goal(self._work, ranks, self._data, keep or 0.5, error, latency, allocation)
            taken = goal.ranks_taken()
            asked = ranks.asked(keep or 0.5) if latency is None and error is None else {}
            return _Result(self._work, ranks, self._data, asked).finished(taken, self._sequential, recovery, progress)


class _Goal:
    """Ranks for one of the three goals."""

    def __init__(
        self,
        work: Workpiece,
        ranks: Ranks,
        data: Calibration | None,
        keep: float,
        error: float | None,
        latency: float | None,
        allocation: str,
    ) -> None:
        self.work = work
        self.ranks = ranks
        self.data = data
        self.keep = keep
        self.error = error
        self.latency = latency
        self.allocation = allocation

    def ranks_taken(self) -> Ranked:
        """The ranks; by measured costs, only if the model that they make measures better."""
        taken = self._chosen()
        cuts = self.ranks.cuts(taken)
        if self.allocation != "measured" or self.data is None or len(self.ranks.sites) < 2 or not cuts:
            return taken
        yields = Yields(self.work, self.data)
        self.ranks.corrections = yields.corrections(cuts, self.ranks.estimates(taken))
        again = self._chosen()
        if self.error is not None:
            better = self.ranks.weights(again) < self.ranks.weights(taken)
        else:
            better = yields.error(self.ranks.cuts(again)) < yields.error(self.ranks.cuts(taken))
        return again if better else taken

    def _chosen(self) -> Ranked:
        if self.error is not None and self.data is not None:
            return self._for_error(self.data, self.error)
        if self.latency is not None and self.data is not None:
            return self.ranks.for_milliseconds(self.latency, milliseconds(self.data, self.work.as_given())[0])
        return self.ranks.for_weights(self.keep, self.allocation)

    def _for_error(self, data: Calibration, error: float) -> Ranked:
        """The smallest budget whose model keeps the error, by bisection; every model on the way is measured."""
        low, high = 0.0, 1.0
        best: Ranked = dict.fromkeys(self.ranks.sites)
        while high - low > 0.01:
            middle = (low + high) / 2
            taken = self.ranks.for_weights(middle, self.allocation)
            if output_error(data, self.work.dense, self.work.build(self.ranks.cuts(taken))[0]) <= error:
                high, best = middle, taken
            else:
                low = middle
        return best


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@torch.no_grad()
def milliseconds(data: Calibration, *models: nn.Module) -> list[float]:
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
        cuts = self.ranks.cuts(taken)
        if not cuts:
            return copy.deepcopy(self.work.original), self._report(taken, copy.deepcopy(self.work.original), 0.0)
        if sequential and self.data is not None:
            cuts = refit(self.work.dense, cuts, self.ranks.statistics, self.data, self.work.build)
        model, places = self.work.build(cuts)
        dense_ms = ms = None
        if self.ranks.gate is not None and self.data is not None:
            dense_ms, ms = milliseconds(self.data, self.work.as_given(), model)
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


def _check(model: Any, calibration: Any, method: str, gate: str, margin: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_choice("method", method, ("data_aware", "svd"))
    _check_choice("gate", gate, ("latency", "none"))
    if not 0 <= margin < 1:
        raise ValueError(f"margin: expected a number in [0, 1), got {margin}")
    if calibration is None and (method != "svd" or gate != "none"):
        raise ValueError(_NO_DATA)


_NO_DATA = 'calibration: expected data, or method="svd", gate="none" and keep=…, got None'


def check_goal(
    calibration: Any, keep: float | None, error: float | None, latency: float | None, allocation: str, gate: str
) -> None:
    """Raise a TypeError or ValueError if what is wanted makes no sense."""
    goals = {"keep": keep, "error": error, "latency": latency}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) > 1:
        raise TypeError(f"compress: expected at most one of keep, error, latency, got {', '.join(given)}")
    for name, value in given.items():
        if not value > 0 or (name == "keep" and value > 1):
            raise ValueError(f"{name}: expected a number {'in (0, 1]' if name == 'keep' else '> 0'}, got {value}")
    _check_choice("allocation", allocation, ("measured", "output", "uniform"))
    if latency is not None and gate == "none":
        raise ValueError('gate: expected "latency" with latency=…, got "none"')
    if calibration is None and error is not None:
        raise ValueError(_NO_DATA)


def _check_choice(name: str, choice: str, known: tuple[str, ...]) -> None:
    if choice not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {choice!r}")
