"""What stands in the way of the Triton backend, told in one line each."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import byol_fast as bf
from byol_fast import reference
from byol_fast.backends import Call, triton, verified

# The package; `byol_fast.backends` is the function.
registry = importlib.import_module("byol_fast.backends")
CALL = Call("bottleneck_mse_loss", torch.bfloat16, 65536, 1024, 1024, 64)


MISSING = "Triton is not installed (pip install triton)"


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of that name"])
def test_missing(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert triton._missing() == MISSING


def test_what_cannot_run_is_told_and_auto_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_reason", MISSING)
    assert str(bf.backends()["triton"]) == f"unavailable: {MISSING}"
    with pytest.raises(
        bf.BackendError, match=r"^use_backend: backend 'triton' cannot run here: Triton is not installed"
    ):
        bf.use_backend("triton")
    monkeypatch.setitem(registry._PREFERENCE, "cpu", ("triton",))
    x, weight = torch.randn(8, 6), torch.randn(2, 6)
    assert bf.explain(x, weight).backend == "reference"
    assert MISSING in bf.explain(x, weight).reason
    assert torch.equal(bf.bottleneck_mse_loss(x, weight), reference.bottleneck_mse_loss(x, weight))


def test_triton_that_came_under_another_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    module = tmp_path / "__init__.py"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(module)))
    monkeypatch.setattr(metadata, "version", version)
    for line, reason in (
        ("'3.7.0+git1b0418a9'", None),
        ('"3.5.1"', "Triton 3.5.1 is too old"),
        ("", "Triton of unknown version is too old"),
    ):
        module.write_text(f'"""isort:skip_file"""\n__version__ = {line}\n')
        assert triton._missing() == (reason and f"{reason}: 3.6 or later is needed (pip install --upgrade triton)")


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=__file__))
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
    # By name it is an error that says so; auto passes the backend by, and says so, too.
    monkeypatch.setattr(registry, "_current", "triton")
    monkeypatch.setattr(registry, "has_torch_function", lambda tensors: False)
    if refused:
        with pytest.raises(bf.BackendError, match=f"^backend 'triton' was chosen, but {expected}; valid choices"):
            registry.choose([OnGpu()], CALL)  # type: ignore[list-item]
    else:
        assert registry.choose([OnGpu()], CALL).backend == "triton"  # type: ignore[list-item]


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
