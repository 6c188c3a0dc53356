"""One test per case: check every variant against the accuracy contract, then time them in turn.

In each round the peers run first, in an order that rotates, then ours: no variant has the machine to itself, or a warm
cache that another lacks. A variant that breaks the contract has no speed; if it is ours, the test fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from time import perf_counter

import pytest
import torch
from contract import assert_contract, relative_error
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .cases import CASES, OURS, QUICK, Case, Run
from .memory import extra_bytes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = QUICK if metafunc.config.getoption("--quick") else CASES
    metafunc.parametrize("case", cases, ids=lambda case: case.id)


def test_speed(case: Case, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    tensors = case.tensors()
    runs = case.variants(tensors)
    report = judge(runs, case.truth(tensors), case.outputs(tensors))
    assert report[OURS]["refused"] is None, report[OURS]["refused"]
    judged = {name: run for name, run in runs.items() if report[name]["refused"] is None}
    seconds = 0.2 if request.config.getoption("--quick") else 3.0
    calls, rounds = plan(judged.values(), seconds)
    samples = interleave(judged, benchmark, calls, rounds)
    for name, times in samples.items():
        quantiles = torch.tensor(times, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        report[name] |= dict(zip(("p20", "p50", "p80"), (quantiles / calls).tolist(), strict=True))
        if case.memory:
            report[name]["extra_bytes"] = extra_bytes(case.id, name)
    benchmark.group = case.operation
    benchmark.extra_info.update(
        operation=case.operation,
        dtype=str(case.dtype).removeprefix("torch."),
        rows=case.rows,
        features=case.features,
        rank=case.rank,
        ratio=case.ratio,
        calls_per_sample=calls,
        samples=rounds,
        variants=report,
    )


def judge(runs: dict[str, Run], truth: Sequence[Tensor], names: Sequence[str]) -> dict[str, dict[str, object]]:
    """The errors of every variant, and why its speed is refused, if it is."""
    eager = runs["eager"]()
    report = {}
    for variant, run in runs.items():
        results, refused = run(), None
        try:
            for result, peer, true, name in zip(results, eager, truth, names, strict=True):
                assert_contract(result, peer, true, name)
        except AssertionError as failure:
            refused = str(failure).splitlines()[0]
        errors = [relative_error(result, true) for result, true in zip(results, truth, strict=True)]
        report[variant] = {"errors": dict(zip(names, errors, strict=True)), "refused": refused}
    return report


def plan(runs: Sequence[Run], seconds: float) -> tuple[int, int]:
    """How many calls make a sample (at least a millisecond) and how many rounds fit the time."""
    once = [min(timed(run, 1) for _ in range(3)) for run in runs]
    calls = ceil(1e-3 / min(once))
    return calls, min(200, max(10, int(seconds / (calls * sum(once)))))


def interleave(
    runs: dict[str, Run], benchmark: BenchmarkFixture, calls: int, rounds: int
) -> dict[str, Sequence[float]]:
    """Seconds of every sample; ours are pytest-benchmark's, the peers run in the untimed set-up of its rounds."""
    peers = [name for name in runs if name != OURS]
    samples: dict[str, list[float]] = {name: [] for name in peers}

    def play_peers() -> None:
        peers.append(peers.pop(0))
        for name in peers:
            samples[name].append(timed(runs[name], calls))

    benchmark.pedantic(repeat, (runs[OURS], calls), setup=play_peers, rounds=rounds)
    return samples | {OURS: benchmark.stats.stats.data}


def timed(run: Callable[[], object], calls: int) -> float:
    start = perf_counter()
    repeat(run, calls)
    return perf_counter() - start


def repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()
