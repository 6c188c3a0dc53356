"""Ranks for a budget: each step goes where it saves most of the model's output error for its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Option", "allocate", "uniform"]

Key = TypeVar("Key")


@dataclass(frozen=True)
class Option:
    """A rank that a layer may get, or None for leaving it dense: what it costs, and what error it leaves."""

    rank: int | None
    cost: float
    error: float


def allocate(options: Mapping[Key, Sequence[Option]], budget: float) -> dict[Key, Option]:
    """Choose an option for each layer: least error in total, of those that cost no more than ``budget`` in total.

    Only the lower convex hull of a layer's options counts. Starting at its cheapest option everywhere, the step that
    saves most error per cost is taken, as long as it fits. That is optimal up to the last step of each layer, which may
    not fit; leaving a layer dense is a step like others, only longer. If not even the cheapest options fit, they are
    the answer.
    """
    hulls = {key: _hull(choices) for key, choices in options.items()}
    steps = [_Step(key, hull[i], hull[i + 1]) for key, hull in hulls.items() for i in range(len(hull) - 1)]
    # Along a hull, gains descend; the sort is stable, so that equal ones keep their order.
    steps.sort(key=lambda step: -step.gain)
    taken = {key: hull[0] for key, hull in hulls.items()}
    left = budget - sum(option.cost for option in taken.values())
    for step in steps:
        # A layer one of whose steps did not fit takes no later one, for it is not where that would begin.
        if taken[step.key] is step.begin and step.cost <= left:
            taken[step.key] = step.end
            left -= step.cost
    _spend(options, taken, left)
    return taken


def _spend(options: Mapping[Key, Sequence[Option]], taken: dict[Key, Option], left: float) -> None:
    """Spend what steps along the hulls left over on the option that saves most error, while one fits."""
    while True:
        best: tuple[float, Key, Option] | None = None
        for key, choices in options.items():
            now = taken[key]
            for option in choices:
                saved = now.error - option.error
                if option.cost <= now.cost + left and saved > (best[0] if best else 0.0):
                    best = (saved, key, option)
        if best is None:
            return
        left -= best[2].cost - taken[best[1]].cost
        taken[best[1]] = best[2]


def uniform(options: Mapping[Key, Sequence[Option]], dense: Mapping[Key, float], keep: float) -> dict[Key, Option]:
    """The largest rank of each layer that costs at most the share ``keep`` of it; else the smallest there is."""
    taken = {}
    for key, choices in options.items():
        ordered = sorted(choices, key=lambda option: option.cost)
        fitting = [option for option in ordered if option.cost <= keep * dense[key]]
        taken[key] = fitting[-1] if fitting else ordered[0]
    return taken


class _Step(Generic[Key]):
    def __init__(self, key: Key, begin: Option, end: Option) -> None:
        self.key = key
        self.begin = begin
        self.end = end
        self.cost = end.cost - begin.cost
        self.gain = (begin.error - end.error) / self.cost


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of error over cost, by rising cost and falling error."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        if hull and option.cost <= hull[-1].cost:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(begin: Option, end: Option) -> float:
    return (end.error - begin.error) / (end.cost - begin.cost)
