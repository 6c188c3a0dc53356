"""``auto`` and GPUs: nothing unverified, nothing that measured slower, nothing without a committed measurement."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from byol_fast.backends import Call, verified

ROOT = Path(__file__).parents[1]
# The package's name for it is that of a function.
registry = sys.modules["byol_fast.backends"]
CALL = Call("bottleneck_mse_loss", torch.bfloat16, 65536, 1024, 1024, 64)
GPU = torch.device("cuda", 0)


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> verified.Findings:
    monkeypatch.setattr(verified, "architecture", lambda device: "sm_90")
    finding = verified.Finding(verified=["triton", "cuda"], fastest="triton", source="none")
    return {"sm_90": {verified.call_class(CALL): finding}}


def test_what_is_verified_and_fastest_runs(findings: verified.Findings) -> None:
    assert verified.reason_against("triton", CALL, GPU, findings) is None


def test_kernels_that_no_gpu_of_this_kind_has_run_are_said_to_be_unverified(findings: verified.Findings) -> None:
    for backend in ("cuda", "triton"):
        assert verified.caveat(backend, GPU, findings) is None
        assert verified.caveat(backend, torch.device("cpu"), {}) is None
        assert "unverified on sm_90" in str(verified.caveat(backend, GPU, {}))
    assert verified.caveat("gram", GPU, {}) is None


def test_what_measured_slower_does_not(findings: verified.Findings) -> None:
    reason = verified.reason_against("cuda", CALL, GPU, findings)
    assert reason == "triton measured faster on such calls on sm_90"


def test_without_findings_pytorch_s_own_products_run_where_they_do_less_work(findings: verified.Findings) -> None:
    for known in ({}, findings):
        assert verified.reason_against("gram", CALL._replace(dtype=torch.float16), GPU, known) is None
        assert "not yet verified" in str(verified.reason_against("triton", CALL._replace(rank=65), GPU, known))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "reads a number back"),
        ({"dtype": torch.float64}, "reads a number back"),
        ({"rows": 32767}, "below 33554432 elements"),
        ({"rank": 505}, "more operations"),
    ],
)
def test_without_findings_eager_runs_what_the_gram_route_need_not_win(change: dict[str, object], reason: str) -> None:
    against = verified.reason_against("gram", CALL._replace(**change), GPU, findings={})  # type: ignore[arg-type]
    assert reason in str(against)


def test_a_finding_outweighs_what_was_counted(findings: verified.Findings) -> None:
    name = verified.call_class(CALL)
    assert "not yet verified" in str(verified.reason_against("gram", CALL, GPU, findings))
    slower = {"sm_90": {name: {**findings["sm_90"][name], "verified": ["triton", "gram"], "fastest": "triton"}}}
    assert verified.reason_against("gram", CALL, GPU, slower) == "triton measured faster on such calls on sm_90"  # type: ignore[arg-type]


class OnGpu(torch.Tensor):
    """As much of a CUDA tensor as the choice of a backend asks for."""

    device = GPU  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl


def chosen(call: Call, monkeypatch: pytest.MonkeyPatch, findings: verified.Findings) -> tuple[str, str]:
    """What ``auto`` runs on a machine whose GPU both kernels' backends can use."""
    for name in ("triton", "cuda"):
        monkeypatch.setattr(registry._REGISTRY[name], "unavailable", lambda: None)
        monkeypatch.setattr(registry._REGISTRY[name], "refuses", lambda tensors: None)
    for function in (verified.reason_against, verified.reason_for):
        defaults = (*(function.__defaults__ or ())[:-1], findings)
        monkeypatch.setattr(function, "__defaults__", defaults)
    choice = registry.choose([torch.empty(1, dtype=call.dtype).as_subclass(OnGpu)], call)
    return choice.backend, choice.reason


def test_auto_runs_a_kernel_where_it_is_verified_and_fastest(
    monkeypatch: pytest.MonkeyPatch, findings: verified.Findings
) -> None:
    backend, reason = chosen(CALL, monkeypatch, findings)
    assert backend == "triton"
    assert reason == (
        "measured fastest on such calls on sm_90 (none); cuda: triton measured faster on such calls on sm_90"
    )


def test_auto_runs_the_gram_route_where_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, findings: verified.Findings
) -> None:
    monkeypatch.setattr(verified, "architecture", lambda device: "sm_80")
    backend, reason = chosen(CALL, monkeypatch, findings)
    assert backend == "gram"
    assert reason == (
        "it moves a third of the bytes of eager PyTorch in fewer operations, by count and not yet measured here; "
        "cuda: its results on such calls are not yet verified on sm_80; "
        "triton: its results on such calls are not yet verified on sm_80"
    )


def test_auto_runs_eager_pytorch_where_it_measured_fastest(
    monkeypatch: pytest.MonkeyPatch, findings: verified.Findings
) -> None:
    name = verified.call_class(CALL)
    everything = {"verified": ["triton", "cuda", "gram"], "fastest": "reference", "source": "none"}
    backend, reason = chosen(CALL, monkeypatch, {"sm_90": {name: everything}})  # type: ignore[dict-item]
    assert backend == "reference"
    assert reason == "; ".join(
        f"{name}: reference measured faster on such calls on sm_90" for name in ("cuda", "triton", "gram")
    )


def test_auto_runs_eager_pytorch_for_a_layer_that_is_not_verified(
    monkeypatch: pytest.MonkeyPatch, findings: verified.Findings
) -> None:
    backend, reason = chosen(CALL._replace(operation="bottleneck"), monkeypatch, findings)
    assert backend == "reference"
    assert "gram: it only has something to offer for the loss of a dense input" in reason


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
