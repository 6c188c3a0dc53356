"""The GPU run: it goes on after a failure and reports it, and what it lets ``auto`` use is what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Last, so that an installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parents[1]))

pytest.importorskip("triton", reason="the GPU run compares with Triton's kernels")

from bench.gpu import __main__ as run
from bench.gpu import checks, report, sanitize, timing
from byol_fast.backends import Call, verified

CASES = [timing.Case("step", 65536, 1024, 64), timing.Case("step", 65536, 4096, 64)]
CLASS = CASES[0].call_class()
LINE = '{"kind": "probe", "what": "a", "found": {}}'


def result(passed: bool = True, slow: str = "") -> dict[str, Any]:
    """What the stages of a run on two cases of one class report; on the second, one backend may be slow."""
    gathered: dict[str, Any] = {
        "architecture": "sm_90", "machine": {"device": "a card", "torch": "2", "triton": "3"},
        "probes": {}, "checks": {}, "times": {}, "failures": [],
    }  # fmt: skip
    lines: list[dict[str, Any]] = [{"kind": "probe", "what": "copy_bandwidth", "found": {"bytes_per_s": 4e12}}]
    for backend in ("triton", "gram"):
        check = {"kind": "check", "backend": backend, "what": "step", "classes": [CLASS]}
        lines.append(check if passed or backend != "triton" else {**check, "why": "AssertionError: 0.1"})
    for place, case in enumerate(CASES):
        for contender, median in {"eager": 400.0, "triton": 70.0, "gram": 100.0}.items():
            time = {"median_us": 900.0 if place and contender == slow else median, "extra_bytes": None}
            lines.append({"kind": "time", "what": contender, "case": case.id, "call_class": CLASS, "found": time})
    for line in lines:
        report.take(gathered, line)
    return gathered


def test_the_fastest_of_those_that_passed_is_what_auto_may_use(tmp_path: Path) -> None:
    for folder in ("bench", "byol_fast/backends"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / report.PACKAGE).write_text('{"sm_80": {}}')
    report.write(result(), tmp_path)
    findings = json.loads((tmp_path / report.PACKAGE).read_text())
    assert set(findings) == {"sm_80", "sm_90"}
    source = tmp_path / findings["sm_90"][CLASS]["source"]
    assert json.loads(source.read_text())["findings"] == findings["sm_90"]
    assert "| triton | 70.0 | 5.71 |" in source.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("changes", "fastest", "approved"),
    [
        ({}, "triton", ["gram", "triton"]),
        ({"passed": False}, "gram", ["gram"]),
        # It has to win in every case of the class.
        ({"slow": "triton"}, "reference", ["gram", "triton"]),
    ],
    ids=str,
)
def test_what_failed_or_lost_a_case_is_not_used(changes: dict[str, Any], fastest: str, approved: list[str]) -> None:
    found = report.findings(result(**changes), "bench/results/gpu-sm_90.json")[CLASS]
    assert (found["fastest"], found["verified"]) == (fastest, approved)


def test_a_failed_check_is_in_the_table() -> None:
    assert "- triton: step: AssertionError: 0.1" in report.table({**result(passed=False), "seconds": 1})


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        (
            subprocess.CompletedProcess([], -11, '{"kind": "probe", "what": "a", "found": {}}\nnoise\n', ""),
            "status -11",
        ),
        (subprocess.TimeoutExpired([], 5, b'{"kind": "probe", "what": "a", "found": {}}\n'), "it ran past 5 s"),
    ],
    ids=["crash", "time-out"],
)
def test_a_stage_that_dies_leaves_what_it_found_and_a_line(
    monkeypatch: pytest.MonkeyPatch, ends: Any, why: str
) -> None:
    def ended(*arguments: object, **options: object) -> Any:
        if isinstance(ends, Exception):
            raise ends
        return ends

    monkeypatch.setattr(subprocess, "run", ended)
    found, failure = run._lines("probes", 5)
    assert found["what"] == "a"
    assert failure["what"] == "probes"
    assert why in failure["why"]


def test_a_check_that_raises_is_reported_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> None:
        raise AssertionError("off by 0.1")

    found = [("first", {CLASS}, wrong), ("second", {CLASS}, lambda: None)]
    monkeypatch.setattr(checks, "checks", lambda backend: iter(found))
    run._checks(["reference", "0/1"], until=float("inf"))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["why"] == "AssertionError: off by 0.1"
    assert "why" not in second


def test_checks_side_by_side_are_all_of_them_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["one", "two", "three", "four", "five"]
    monkeypatch.setattr(checks, "checks", lambda backend: ((name, {CLASS}, lambda: None) for name in names))
    monkeypatch.setattr(run, "_SIDE_BY_SIDE", 3)
    for stage in run._shares("checks reference"):
        run._checks(stage.split()[1:], until=float("inf"))
    found = [json.loads(line)["what"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(found) == sorted(names)


def test_stages_side_by_side_report_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_lines", lambda stage, seconds: [{"what": f"{stage}, {seconds} s"}])
    found = list(run._side_by_side(["checks triton 0/2", "checks triton 1/2"], 5))
    assert found == [{"what": "checks triton 0/2, 5 s"}, {"what": "checks triton 1/2, 5 s"}]


def test_a_tool_that_finds_an_error_spoils_every_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(tool: str, seconds: float) -> None:
        if tool == "racecheck":
            raise RuntimeError("racecheck: ERROR SUMMARY: 1 error")

    monkeypatch.setattr(sanitize, "sanitize", raises)
    run._sanitize([], until=float("inf"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["what"].split(", ")[1] for line in lines] == list(sanitize.TOOLS)
    assert [line["what"] for line in lines if "why" in line] == ["compute-sanitizer, racecheck"]
    call = Call("bottleneck_mse_loss", torch.bfloat16, 65536, 1024, 1024, 64)
    assert all(verified.call_class(call) in line["classes"] for line in lines)
