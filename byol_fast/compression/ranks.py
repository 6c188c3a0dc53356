"""What is known of each layer, and the ranks that follow for a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from .allocate import Option, allocate, uniform
from .calibration import Calibration
from .factorize import Decomposition, decompose
from .find import Refusal, Site
from .gate import Gate
from .kinds import Factors
from .statistics import Statistics, measure

__all__ = ["Ranked", "Ranks"]

Ranked = dict[Site, "int | None"]


class Ranks:
    """Statistics, factors of every rank, and break-even ranks; sites that cannot be judged or cannot win are refused.

    Attributes:
        sites: those that can be replaced.
        refusals: why others are not.
        limits: the break-even rank of each site: by time with a gate, else by weights.
        corrections: factors by which the estimated costs of sites are wrong, where that is known.
    """

    def __init__(self, sites: list[Site], refusals: list[Refusal], gate: Gate | None) -> None:
        self.sites = list(sites)
        self.refusals = list(refusals)
        self.gate = gate
        self.statistics: dict[Site, Statistics] = {}
        self.decompositions: dict[Site, Decomposition] = {}
        self.limits: dict[Site, int] = {}
        self.corrections: dict[Site, float] = {}
        for site in sites:
            self.limits[site] = min(site.max_rank, (site.size - 1) // site.unit)
            if self.limits[site] == 0:
                self.refuse([site], "break-even rank 0: a bottleneck of rank 1 has no fewer weights")

    def copy(self) -> Ranks:
        """One that can be refused sites without a change of this one; statistics, factors and times are the same."""
        other = copy.copy(self)
        other.sites, other.refusals = list(self.sites), list(self.refusals)
        other.limits, other.corrections = dict(self.limits), dict(self.corrections)
        return other

    def refuse(self, sites: list[Site], reason: str) -> None:
        """Leave sites dense."""
        self.refusals += [Refusal(site.name, site.kind.title, site.size, reason) for site in sites]
        self.sites = [site for site in self.sites if site not in sites]

    def calibrate(self, dense: nn.Module, calibration: Calibration, seed: int, keep_row_weights: bool) -> None:
        """Take the statistics and, with a gate, the times."""
        flags = [(parameter, parameter.requires_grad) for parameter in dense.parameters()]
        try:
            # Gradients of activations are wanted, those of weights would be for nothing.
            dense.requires_grad_(False)
            self.statistics = measure(
                self.sites,
                lambda: iter(calibration),
                lambda batch: calibration.forward(dense, batch),
                seed,
                keep_row_weights,
            )
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        uncalled = [site for site in self.sites if self.statistics[site].call is None]
        self.refuse(uncalled, "it was not called by the calibration batches")
        lost = [site for site in self.sites if not self.statistics[site].matters()]
        self.refuse(lost, "no gradient of the model's output reaches it: what it is worth is not known")
        self._look_for_limits()

    def _look_for_limits(self) -> None:
        for site in list(self.sites) if self.gate is not None else []:
            call = self.statistics[site].call
            if self.gate is None or call is None:
                continue
            self.limits[site] = self.gate.break_even(site, call)
            if self.limits[site] == 0:
                dense, bottleneck = self.gate.times(site, call, 1)
                self.refuse(
                    [site], f"break-even rank 0: rank 1 takes {bottleneck:.3f} ms, the dense layer {dense:.3f} ms"
                )

    def decompose(self, method: str) -> None:
        """Factors of every rank."""
        for site in self.sites:
            self.decompositions[site] = decompose(
                site.matrix, self.statistics[site] if method == "data_aware" else None
            )

    def cuts(self, taken: Ranked) -> dict[Site, Factors]:
        """The factors of these ranks."""
        return {site: self.decompositions[site].cut(rank) for site, rank in taken.items() if rank is not None}

    def estimates(self, taken: Ranked) -> dict[Site, float]:
        """What these ranks cost by the estimate as it is, of ‖f‖²."""
        return {site: float(self.decompositions[site].costs[rank]) for site, rank in taken.items() if rank is not None}

    @staticmethod
    def weights(taken: Ranked) -> float:
        """Weights that these ranks leave."""
        return sum(_weights(site, rank) for site, rank in taken.items())

    # --------------------------------------------------------------------------------------------------- a budget

    def for_weights(self, keep: float, allocation: str) -> Ranked:
        """Ranks for a share of the weights."""

        def choose() -> dict[Site, Option]:
            options = self._options(_weights)
            dense = {site: float(site.size) for site in self.sites}
            if allocation == "uniform":
                return uniform(options, dense, keep)
            return allocate(options, keep * sum(dense.values()))

        return self._settled(choose)

    def for_milliseconds(self, target: float, total: float) -> Ranked:
        """Ranks such that the model's ``total`` less what the bottlenecks save is ``target``."""

        def choose() -> dict[Site, Option]:
            dense = sum(self._milliseconds(site, None) for site in self.sites)
            return allocate(self._options(self._milliseconds), target - (total - dense))

        return self._settled(choose)

    def asked(self, keep: float) -> Ranked:
        """What the ranks for a share would be, were they not limited by time."""
        options = self._options(_weights, limited=False)
        taken = allocate(options, keep * sum(site.size for site in self.sites))
        return {site: option.rank for site, option in taken.items()}

    def _settled(self, choose: Callable[[], dict[Site, Option]]) -> Ranked:
        """The choice, made again until every layer wins at its own rank."""
        while True:
            ranks = {site: option.rank for site, option in choose().items()}
            slower = False
            for site, rank in ranks.items() if self.gate is not None else ():
                call = self.statistics[site].call
                if self.gate is None or rank is None or call is None or self.gate.wins(site, call, rank):
                    continue
                self.gate.lower(site, call, rank)
                slower = True
            if not slower:
                return ranks
            self._look_for_limits()

    def _options(self, cost: Callable[[Site, int | None], float], limited: bool = True) -> dict[Site, list[Option]]:
        options = {}
        for site in self.sites:
            upper = self.limits[site] if limited else min(site.max_rank, (site.size - 1) // site.unit)
            errors = (self.decompositions[site].costs * self.corrections.get(site, 1.0)).tolist()
            ranks = [Option(rank, cost(site, rank), errors[rank]) for rank in range(1, upper + 1)]
            options[site] = [*ranks, Option(None, cost(site, None), 0.0)]
        return options

    def _milliseconds(self, site: Site, rank: int | None) -> float:
        """Of all calls for a batch; between ranks that were timed, along a line."""
        found = self.statistics[site]
        if self.gate is None or found.call is None:
            return 0.0
        dense, first = self.gate.times(site, found.call, 1)
        if rank is None:
            return found.calls * dense
        last = self.gate.times(site, found.call, self.limits[site])[1]
        share = (rank - 1) / max(self.limits[site] - 1, 1)
        # Every rank costs something, also where two measure alike.
        return found.calls * (first + max(share * (last - first), 1e-6 * rank))

    def measured(self, site: Site, rank: int | None) -> tuple[float, float] | None:
        """Milliseconds of all calls for a batch, dense and at the rank; None without a gate."""
        found = self.statistics.get(site)
        if self.gate is None or found is None or found.call is None:
            return None
        dense, bottleneck = self.gate.times(site, found.call, rank or self.limits[site])
        return found.calls * dense, found.calls * (dense if rank is None else bottleneck)


def _weights(site: Site, rank: int | None) -> float:
    return float(site.size if rank is None else rank * site.unit)
