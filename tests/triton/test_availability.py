"""What stands in the way of the Triton backend, told in one line each."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from byol_fast.backends import Call, triton, verified

CALL = Call("bottleneck_mse_loss", torch.bfloat16, 65536, 1024, 1024, 64)


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton._missing() == "Triton is not installed (pip install triton)"


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", lambda name: "3.5.1")
    expected = "Triton 3.5.1 is too old: 3.6 or later is needed (pip install --upgrade triton)"
    assert triton._missing() == expected
    monkeypatch.setattr(metadata, "version", lambda name: "3.10.0+git1")
    assert triton._missing() is None


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_reason", None)
    monkeypatch.setattr(triton, "_interpreted", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = triton.Triton().unavailable()
    assert reason == "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


class OnGpu:
    """As much of a CUDA tensor as the question needs."""

    device = torch.device("cuda", 0)
    dtype = torch.bfloat16


@pytest.mark.parametrize(("architecture", "refused"), [("sm_75", True), ("sm_80", False), ("sm_120", False)])
def test_gpu_too_old(monkeypatch: pytest.MonkeyPatch, architecture: str, refused: bool) -> None:
    monkeypatch.setattr(triton, "_interpreted", False)
    monkeypatch.setattr(verified, "architecture", lambda device: architecture)
    reason = triton.Triton().refuses([OnGpu()])  # type: ignore[list-item]
    expected = f"its kernels need a GPU of compute capability 8.0 or later, and this one is {architecture}"
    assert reason == (expected if refused else None)


def test_tensors_that_are_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_interpreted", False)
    assert triton.Triton().refuses([torch.empty(1)]) == "it runs tensors on cuda, not on cpu"


@pytest.mark.parametrize("change", [{"rank": 129}, {"dtype": torch.float64}, {"sparse": True}])
def test_auto_leaves_what_the_kernels_are_not_made_for(change: dict[str, object]) -> None:
    backend = triton.Triton()
    assert backend.declines(CALL) is None
    assert "up to 128" in str(backend.declines(CALL._replace(**change)))  # type: ignore[arg-type]


def test_a_tensor_on_another_gpu_than_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched on the tensor's device, and the current one is what it was afterwards."""
    launch = pytest.importorskip("byol_fast.backends.triton.launch")
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: events.append(index) or 0)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: events.append(index) or 0)
    events: list[object] = []

    def squared_error_sum(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        events.append("launch")
        return torch.zeros(())

    monkeypatch.setattr(launch, "squared_error_sum", squared_error_sum)
    other = SimpleNamespace(device=torch.device("cuda", 1), is_cuda=True, dtype=torch.bfloat16)
    triton.Triton().squared_error(other, other)  # type: ignore[arg-type]
    assert events == [1, "launch", 0]
