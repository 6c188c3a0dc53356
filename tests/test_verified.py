"""``auto`` and GPUs: nothing unverified, nothing that measured slower, nothing without a committed measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from byol_fast.backends import Call, verified

ROOT = Path(__file__).parents[1]
CALL = Call("bottleneck_mse_loss", torch.bfloat16, 65536, 1024, 1024, 64)
GPU = torch.device("cuda", 0)


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> verified.Findings:
    monkeypatch.setattr(verified, "architecture", lambda device: "sm_90")
    finding = verified.Finding(verified=["triton", "cuda"], fastest="triton", source="none")
    return {"sm_90": {verified.call_class(CALL): finding}}


def test_what_is_verified_and_fastest_runs(findings: verified.Findings) -> None:
    assert verified.reason_against("triton", CALL, GPU, findings) is None


def test_what_measured_slower_does_not(findings: verified.Findings) -> None:
    reason = verified.reason_against("cuda", CALL, GPU, findings)
    assert reason == "triton measured faster on such calls on sm_90"


@pytest.mark.parametrize(
    "change", [{"rank": 65}, {"rows": 16383}, {"dtype": torch.float32}, {"operation": "bottleneck"}, {"sparse": True}]
)
def test_another_class_of_calls_is_not_verified(findings: verified.Findings, change: dict[str, object]) -> None:
    reason = verified.reason_against("triton", CALL._replace(**change), GPU, findings)  # type: ignore[arg-type]
    assert reason == "its results on such calls are not yet verified on sm_90"


def test_another_backend_or_architecture_is_not_verified(
    findings: verified.Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verified.reason_against("other", CALL, GPU, findings) is not None
    monkeypatch.setattr(verified, "architecture", lambda device: "sm_80")
    assert verified.reason_against("triton", CALL, GPU, findings) is not None


def test_processors_need_no_verification() -> None:
    assert verified.reason_against("native", CALL, torch.device("cpu")) is None


def test_every_finding_in_the_package_has_its_committed_measurement() -> None:
    for architecture, classes in json.loads((ROOT / "byol_fast/backends/verified.json").read_text()).items():
        for name, finding in classes.items():
            measured = json.loads((ROOT / finding["source"]).read_text())
            assert measured["architecture"] == architecture
            assert measured["findings"][name] == finding
