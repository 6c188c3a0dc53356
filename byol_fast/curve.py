"""The trade-off between rank and yield, and how to spend a budget on it."""

from __future__ import annotations

import csv
import heapq
import os
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from .files import replacing
from .svd import checked_rank

__all__ = ["YieldCurve", "allocate_ranks"]


class YieldCurve:
    """Yield and error of the best linear bottleneck of every rank.

    The yield of a rank is the share of the data's energy that it keeps: 1 − ‖x − x̂‖² / ‖x − mean‖². The best possible
    one is a sum of leading eigenvalues of the covariance (Eckart and Young, Psychometrika 1, 1936), so all ranks follow
    from one decomposition.

    Args:
        energies: eigenvalues of the covariance, descending, ``[r]``: the mean squared size of each principal part.
        in_features: size D of a row.
        total: sum of all D eigenvalues where ``energies`` are only the first; None means their sum.

    Raises:
        ValueError: ``energies`` are not one-dimensional, descending and ≥ 0, more than D, or more than ``total``.

    Attributes:
        max_rank: the last rank of the curve, r.
        yields: yield at ranks 0 … r, float64.
        errors: mean squared error per element at ranks 0 … r, float64: what ``reconstruction_loss`` attains at best.
    """

    def __init__(self, energies: Tensor, in_features: int, total: float | None = None) -> None:
        energies = energies.detach().to("cpu", torch.float64)
        if energies.dim() != 1 or not 1 <= len(energies) <= in_features:
            raise ValueError(f"energies: expected shape [r] with 1 ≤ r ≤ {in_features}, got {list(energies.shape)}")
        if not (energies >= 0).all() or (energies.diff() > 0).any():
            raise ValueError("energies: expected descending numbers ≥ 0")
        known = float(energies.sum())
        total = known if total is None else total
        # Sums of the same numbers in another order differ in their last digits.
        if total < known * (1 - 1e-9):
            raise ValueError(f"total: expected at least the sum of energies, {known}, got {total}")
        self.in_features = in_features
        self.max_rank = len(energies)
        # Added up from the smallest, so that what is left at high ranks keeps its digits.
        tails = torch.cat((energies.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)))
        left = tails + max(total - known, 0.0) * (self.max_rank < in_features)
        self.errors = left / in_features
        # Data without energy has lost none of it.
        self.yields = 1 - left / left[0] if left[0] > 0 else torch.ones_like(left)

    def yield_at(self, rank: SupportsIndex) -> float:
        """The best possible yield at this rank.

        Raises:
            TypeError: ``rank`` is no integer.
            ValueError: ``rank`` is not in 1 … ``max_rank``.
        """
        return float(self.yields[self._checked(rank)])

    def error_at(self, rank: SupportsIndex) -> float:
        """The smallest possible mean squared error per element at this rank; raises as :meth:`yield_at`."""
        return float(self.errors[self._checked(rank)])

    def ratio_at(self, rank: SupportsIndex) -> float:
        """How many times smaller the code is than the row; raises as :meth:`yield_at`."""
        return self.in_features / self._checked(rank)

    def rank_for(
        self,
        *,
        energy: float | None = None,
        error: float | None = None,
        ratio: float | None = None,
        bytes: float | None = None,
        itemsize: int = 4,
    ) -> int:
        """The rank that meets one demand: the smallest for a quality, the largest for a size.

        Args:
            energy: the least yield, in (0, 1].
            error: the largest mean squared error per element.
            ratio: how many times smaller than a row its code has to be, at least.
            bytes: how many bytes the code of a row may take.
            itemsize: bytes of each number in the code.

        Raises:
            TypeError: not exactly one demand is given.
            ValueError: the demand is out of range, or no rank of this curve meets it.
        """
        demands = {"energy": energy, "error": error, "ratio": ratio, "bytes": bytes}
        given = [(name, value) for name, value in demands.items() if value is not None]
        if len(given) != 1:
            raise TypeError(f"rank_for: expected exactly one of energy, error, ratio, bytes, got {len(given)}")
        name, value = given[0]
        if not value > 0 or (name == "energy" and value > 1):
            raise ValueError(f"{name}: expected a number {'in (0, 1]' if name == 'energy' else '> 0'}, got {value}")
        if name == "energy":
            return self._smallest(self.yields >= value, f"energy: a yield of {value}")
        if name == "error":
            return self._smallest(self.errors <= value, f"error: a mean squared error of {value}")
        largest = int(self.in_features / value) if name == "ratio" else int(value // itemsize)
        if largest < 1:
            limit = f"{self.in_features} at rank 1" if name == "ratio" else f"{itemsize} at rank 1"
            raise ValueError(f"{name}: no rank meets {value}; the curve offers {limit}")
        return min(largest, self.max_rank)

    def _smallest(self, meets: Tensor, demand: str) -> int:
        ranks = meets.nonzero()
        if len(ranks) == 0:
            last = self.max_rank
            raise ValueError(
                f"{demand} is not reached by rank {last}, where the curve ends with a yield of "
                f"{self.yield_at(last):.6g} and an error of {self.error_at(last):.6g}"
            )
        return max(int(ranks[0]), 1)

    def _checked(self, rank: SupportsIndex) -> int:
        return checked_rank(rank, self.max_rank, "the curve's last rank")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write ``rank,yield,error,ratio,parameters`` for every rank; a failed write leaves no file behind.

        Parameters are those of a :class:`byol_fast.Bottleneck` with biases.
        """
        with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("rank", "yield", "error", "ratio", "parameters"))
            for rank in range(1, self.max_rank + 1):
                parameters = 2 * self.in_features * rank + rank + self.in_features
                writer.writerow(
                    (rank, self.yield_at(rank), self.error_at(rank), self.in_features / rank, parameters),
                )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curve into a file whose suffix says the format; a failed write leaves no file behind.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise ModuleNotFoundError("plot needs matplotlib: pip install 'byol_fast[plot]'") from None
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="rank", ylabel="yield (%)", ylim=(0, 102))
        ranks = range(1, self.max_rank + 1)
        axes.plot(ranks, 100 * self.yields[1:].numpy())
        axes.grid(alpha=0.3)
        ratio = axes.secondary_xaxis("top", functions=(self._other_axis, self._other_axis))
        ratio.set_xlabel("compression ratio")
        with replacing(path) as temporary:
            figure.savefig(temporary)

    def _other_axis(self, values: Any) -> Any:
        """Rank to ratio, and back: the same function. The axis asks about 0 too."""
        return self.in_features / np.maximum(values, 1e-9)

    def __repr__(self) -> str:
        marks = [share for share in (0.5, 0.9, 0.95, 0.99) if self.yields[-1] >= share]
        reached = [f"{share:.0%} at rank {self.rank_for(energy=share)}" for share in marks]
        end = f"{self.yields[-1]:.2%} at rank {self.max_rank}"
        return f"YieldCurve(in_features={self.in_features}, yield: {', '.join([*reached, end])})"


def allocate_ranks(
    curves: Mapping[str, YieldCurve], budget: float, *, costs: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Choose the rank of several layers for the most total yield within a budget.

    Starting at rank 1 everywhere, the next rank goes where it adds most yield per cost. Yield curves are concave, so no
    choice that spends as much or less has more total yield; where the costs of layers differ, a remainder smaller than
    one step may stay unspent, and another choice may be better by at most what that step would have added.

    Args:
        curves: the yield curve of each layer.
        budget: what all ranks together may cost: parameters, bytes or milliseconds.
        costs: what one rank of each layer costs; None means its parameters, ``2·in_features``.

    Returns:
        The rank of each layer.

    Raises:
        ValueError: ``costs`` do not have the same names or are not > 0, or the budget does not suffice for rank 1
            everywhere.
    """
    costs = {name: 2.0 * curve.in_features for name, curve in curves.items()} if costs is None else costs
    if set(costs) != set(curves) or not all(cost > 0 for cost in costs.values()):
        raise ValueError(f"costs: expected a number > 0 for each of {', '.join(curves)}, got {dict(costs)}")
    left = budget - sum(costs.values())
    if left < 0:
        raise ValueError(
            f"budget: expected at least {sum(costs.values())}, the cost of rank 1 everywhere, got {budget}"
        )
    ranks = dict.fromkeys(curves, 1)

    def candidate(name: str) -> tuple[float, str]:
        gain = curves[name].yields[ranks[name] + 1] - curves[name].yields[ranks[name]]
        return -float(gain) / costs[name], name

    candidates = [candidate(name) for name in curves if curves[name].max_rank > 1]
    heapq.heapify(candidates)
    while candidates:
        _, name = heapq.heappop(candidates)
        # A layer whose next rank is too dear stays where it is: all its ranks cost the same.
        if costs[name] <= left:
            left -= costs[name]
            ranks[name] += 1
            if ranks[name] < curves[name].max_rank:
                heapq.heappush(candidates, candidate(name))
    return ranks
