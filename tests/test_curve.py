"""The yield curve and the choice of ranks."""

import csv
import itertools
import sys

import pytest
import torch
from sklearn.datasets import load_digits

import byol_fast as bf


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().data)


@pytest.fixture(scope="module")
def curve(digits):
    return bf.StreamingPCA(64).partial_fit(digits).curve()


def test_every_point_is_the_loss_of_the_truncated_svd(digits, curve):
    centered = digits - digits.mean(0)
    squares = torch.linalg.svdvals(centered).square()
    for rank in range(1, 65):
        error = float(squares[rank:].sum()) / digits.numel()
        assert curve.error_at(rank) == pytest.approx(error, rel=1e-9, abs=1e-13)
        assert curve.yield_at(rank) == pytest.approx(1 - float(squares[rank:].sum() / squares.sum()), rel=1e-12)
        assert curve.ratio_at(rank) == 64 / rank
    assert curve.yield_at(64) == 1
    assert curve.yields[0] == 0


def test_rank_for_meets_the_demand_at_the_edge(curve):
    for rank in (1, 2, 17, 40):
        assert curve.rank_for(energy=curve.yield_at(rank)) == rank
        assert curve.rank_for(energy=curve.yield_at(rank) + 1e-9) == rank + 1
        assert curve.rank_for(error=curve.error_at(rank)) == rank
        assert curve.rank_for(error=curve.error_at(rank) * (1 - 1e-9)) == rank + 1
    assert curve.rank_for(energy=1e-9) == 1
    assert curve.rank_for(error=1e9) == 1
    assert [curve.rank_for(ratio=ratio) for ratio in (1, 2, 3, 64, 0.5)] == [64, 32, 21, 1, 64]
    assert [curve.rank_for(bytes=size) for size in (4, 7, 8, 1000)] == [1, 1, 2, 64]
    assert curve.rank_for(bytes=8, itemsize=2) == 4


@pytest.mark.parametrize(
    ("demand", "error", "message"),
    [
        ({}, TypeError, "rank_for: expected exactly one of energy, error, ratio, bytes, got 0"),
        ({"energy": 0.5, "bytes": 8}, TypeError, "rank_for: expected exactly one of .*, got 2"),
        ({"energy": 1.5}, ValueError, r"energy: expected a number in \(0, 1\], got 1.5"),
        ({"error": -1.0}, ValueError, "error: expected a number > 0, got -1.0"),
        ({"error": float("nan")}, ValueError, "error: expected a number > 0, got nan"),
        ({"ratio": 65}, ValueError, "ratio: no rank meets 65; the curve offers 64 at rank 1"),
        ({"bytes": 3}, ValueError, "bytes: no rank meets 3; the curve offers 4 at rank 1"),
    ],
)
def test_impossible_demands_are_said(curve, demand, error, message):
    with pytest.raises(error, match=message):
        curve.rank_for(**demand)


def test_a_partial_curve_says_where_it_ends():
    curve = bf.YieldCurve(torch.tensor([4.0, 2.0]), 5, total=8.0)
    assert [float(y) for y in curve.yields] == [0, 0.5, 0.75]
    with pytest.raises(ValueError, match=r"energy: a yield of 0.9 is not reached by rank 2, .* yield of 0.75 and an"):
        curve.rank_for(energy=0.9)
    with pytest.raises(ValueError, match="rank: expected 1 ≤ rank ≤ the curve's last rank = 2, got 3"):
        curve.yield_at(3)


def test_data_without_energy_loses_none():
    curve = bf.YieldCurve(torch.zeros(3), 3)
    assert curve.yield_at(1) == 1
    assert curve.rank_for(energy=1.0) == 1


@pytest.mark.parametrize(
    ("energies", "total", "message"),
    [
        ([1.0, 2.0], None, "energies: expected descending numbers ≥ 0"),
        ([1.0, -1.0], None, "energies: expected descending numbers ≥ 0"),
        ([1.0, float("nan")], None, "energies: expected descending numbers ≥ 0"),
        ([], None, r"energies: expected shape \[r\] with 1 ≤ r ≤ 3, got \[0\]"),
        ([1.0] * 4, None, r"energies: expected shape \[r\] with 1 ≤ r ≤ 3, got \[4\]"),
        ([1.0], 0.5, r"total: expected at least the sum of energies, 1.0, got 0.5"),
    ],
)
def test_numbers_that_are_no_curve(energies, total, message):
    with pytest.raises(ValueError, match=message):
        bf.YieldCurve(torch.tensor(energies), 3, total)


def test_repr_tells_the_shape(curve):
    assert repr(curve) == (
        "YieldCurve(in_features=64, yield: 50% at rank 5, 90% at rank 21, 95% at rank 29, 99% at rank 41, "
        "100.00% at rank 64)"
    )


def test_to_csv_is_the_curve(curve, tmp_path):
    curve.to_csv(tmp_path / "curve.csv")
    with open(tmp_path / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(range(1, 65))
    assert float(rows[9]["yield"]) == curve.yield_at(10)
    assert float(rows[9]["error"]) == curve.error_at(10)
    assert int(rows[9]["parameters"]) == sum(p.numel() for p in bf.Bottleneck(64, 10).parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["curve.csv"]


@pytest.mark.parametrize("method", ["to_csv", "plot"])
def test_a_failed_write_keeps_the_old_file(curve, tmp_path, monkeypatch, method):
    path = tmp_path / "curve.svg"
    path.write_text("good")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("byol_fast.files.os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        getattr(curve, method)(path)
    assert path.read_text() == "good"
    assert [file.name for file in tmp_path.iterdir()] == ["curve.svg"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_writes_a_figure(curve, tmp_path, suffix):
    curve.plot(tmp_path / f"curve.{suffix}")
    assert (tmp_path / f"curve.{suffix}").stat().st_size > 1000


def test_plot_names_the_extra(curve, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot needs matplotlib: pip install 'byol_fast\[plot\]'"):
        curve.plot(tmp_path / "curve.png")


# -------------------------------------------------------------------------------------------------- several layers


def random_curves(seed, ranks=(3, 4, 5)):
    generator = torch.Generator().manual_seed(seed)
    energies = [torch.rand(rank, generator=generator).sort(descending=True).values for rank in ranks]
    return {f"layer{i}": bf.YieldCurve(e, len(e)) for i, e in enumerate(energies)}


def total_yield(curves, ranks):
    return sum(curves[name].yield_at(rank) for name, rank in ranks.items())


def brute_force(curves, costs, budget):
    choices = (
        dict(zip(curves, ranks, strict=True))
        for ranks in itertools.product(*(range(1, curve.max_rank + 1) for curve in curves.values()))
    )
    affordable = [c for c in choices if sum(costs[name] * rank for name, rank in c.items()) <= budget]
    return max(total_yield(curves, choice) for choice in affordable)


@pytest.mark.parametrize("seed", range(5))
def test_equal_costs_are_allocated_optimally_at_every_budget(seed):
    curves = random_curves(seed)
    costs = dict.fromkeys(curves, 1.0)
    for budget in range(3, 13):
        ranks = bf.allocate_ranks(curves, budget, costs=costs)
        assert sum(ranks.values()) == budget
        assert total_yield(curves, ranks) == pytest.approx(brute_force(curves, costs, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_unequal_costs_are_optimal_for_what_is_spent_greedily(seed):
    """Up to the first step that does not fit, no choice of at most this cost is better."""
    curves = random_curves(seed)
    costs = {"layer0": 1.0, "layer1": 2.5, "layer2": 4.0}
    steps = sorted(
        (-(float(curve.yields[rank + 1] - curve.yields[rank])) / costs[name], name)
        for name, curve in curves.items()
        for rank in range(1, curve.max_rank)
    )
    budget = sum(costs.values())
    for _, name in steps:
        budget += costs[name]
        ranks = bf.allocate_ranks(curves, budget, costs=costs)
        assert total_yield(curves, ranks) == pytest.approx(brute_force(curves, costs, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_at_any_budget_greedy_misses_less_than_its_last_step(seed):
    curves = random_curves(seed)
    costs = {"layer0": 1.0, "layer1": 2.5, "layer2": 4.0}
    largest = max(float(curve.yields.diff().max()) for curve in curves.values())
    for budget in torch.arange(7.5, 33, 0.5).tolist():
        ranks = bf.allocate_ranks(curves, budget, costs=costs)
        assert sum(costs[name] * rank for name, rank in ranks.items()) <= budget
        assert total_yield(curves, ranks) > brute_force(curves, costs, budget) - largest


def test_the_default_cost_is_parameters():
    curves = random_curves(0)
    ranks = bf.allocate_ranks(curves, 70)
    assert sum(2 * curve.in_features * ranks[name] for name, curve in curves.items()) <= 70


@pytest.mark.parametrize(
    ("budget", "costs", "message"),
    [
        (23, None, "budget: expected at least 24.0, the cost of rank 1 everywhere, got 23"),
        (50, {"layer0": 1}, "costs: expected a number > 0 for each of layer0, layer1, layer2, got {'layer0': 1}"),
        (50, {"layer0": 1, "layer1": 1, "layer2": 0}, "costs: expected a number > 0 for each of"),
    ],
)
def test_bad_budgets_are_said(budget, costs, message):
    with pytest.raises(ValueError, match=message):
        bf.allocate_ranks(random_curves(0), budget, costs=costs)
