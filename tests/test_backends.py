"""The registry: status, choice, errors, environment, forks."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from contract import Operands, make_operands

import byol_fast as bf

NATIVE = bf.backends()["native"].available


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_every_backend_is_listed_with_its_reason() -> None:
    statuses = bf.backends()
    assert list(statuses) == ["reference", "native", "gram", "triton", "cuda"]
    assert statuses["reference"].available
    for status in statuses.values():
        assert status.available == (status.reason is None)
        assert str(status) == ("available" if status.available else f"unavailable: {status.reason}")


def test_use_backend_restores_the_former_choice() -> None:
    with bf.use_backend("reference"):
        with pytest.raises(KeyError), bf.use_backend("auto"):
            raise KeyError
        operands = make_operands(4096, 256, 8)
        assert bf.explain(operands.input, operands.encoder_weight).backend == "reference"
    expected = "native" if NATIVE else "reference"
    assert bf.explain(operands.input, operands.encoder_weight).backend == expected


def test_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match=r"^use_backend: expected one of auto, reference, native, gram, triton, cuda, got 'gpu'$"
    ):
        bf.use_backend("gpu")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_absent_backend_says_why_and_what_is_there(name: str) -> None:
    choices = "auto, reference" + (", native" if NATIVE else "") + ", gram"
    pattern = rf"^use_backend: backend '{name}' cannot run here: .+; valid choices on this machine: {choices}$"
    with pytest.raises(bf.BackendError, match=pattern):
        bf.use_backend(name)


@pytest.mark.skipif(not NATIVE, reason="there is no native core in this installation")
def test_explicit_backend_refuses_tensors_it_cannot_take() -> None:
    operands = make_operands(5, 4, 2).map(lambda t: t.to("meta"))
    with bf.use_backend("native"), pytest.raises(bf.BackendError, match="runs tensors on the CPU, not on meta"):
        operands.call(bf.bottleneck)
    operands = make_operands(5, 4, 2).map(lambda t: t.to(torch.float8_e4m3fn))
    with bf.use_backend("native"), pytest.raises(bf.BackendError, match=r"no kernels for torch\.float8_e4m3fn"):
        operands.call(bf.bottleneck)


def test_auto_takes_what_the_kernels_do_not() -> None:
    operands = make_operands(5, 4, 2).map(lambda t: t.to("meta"))
    assert operands.call(bf.bottleneck).shape == (5, 4)
    assert operands.call(bf.bottleneck_mse_loss).shape == ()
    large = make_operands(4096, 256, 8).map(lambda t: t.to("meta"))
    explanation = bf.explain(large.input, large.encoder_weight)
    assert explanation.backend == "reference"
    assert "not on meta" in explanation.reason or not NATIVE


def test_tensor_subclass_runs_in_plain_pytorch() -> None:
    class Logged(torch.Tensor):
        pass

    operands = make_operands(5, 4, 2)
    x = operands.input.as_subclass(Logged)
    output = bf.bottleneck(x, operands.encoder_weight, operands.decoder_weight)
    assert isinstance(output, Logged)


@pytest.mark.parametrize("tied", [False, True])
def test_explain_tells_backend_form_and_reason(backend: str, tied: bool) -> None:
    operands = make_operands(5, 4, 2, tied=tied)
    explanation = operands.call(bf.explain)  # type: ignore[arg-type]
    assert explanation.backend == backend
    assert explanation.reason == "chosen by name"
    assert ("direct" in explanation.form) if backend == "reference" else ("gram" in explanation.form)
    assert ("tied" in explanation.form) == (tied and backend != "reference")
    assert str(explanation) == f"backend {backend} (chosen by name), form: {explanation.form}"


@pytest.mark.skipif(not NATIVE, reason="there is no native core in this installation")
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((4096, 256, 8), torch.float32, "measured fastest on such calls"),
        ((16, 256, 8), torch.float32, "native: PyTorch is faster on so small a product"),
        ((2048, 1024, 256), torch.float32, "native: PyTorch is faster on fewer rows than 16·rank"),
        ((4096, 64, 48), torch.float32, "native: PyTorch is faster at a rank above half of the features"),
        ((1024, 512, 64), torch.bfloat16, "native: PyTorch's bfloat16 products are faster"),
    ],
    ids=str,
)
def test_auto_passes_the_kernels_by_where_they_measured_slower(
    shape: tuple[int, int, int], dtype: torch.dtype, reason: str
) -> None:
    explanation = make_operands(*shape, dtype=dtype).call(bf.explain)  # type: ignore[arg-type]
    assert explanation.reason.startswith(reason)
    assert explanation.backend == ("native" if reason.startswith("measured") else "reference")


def test_environment_variable() -> None:
    code = "import torch, byol_fast as bf; print(bf.explain(torch.randn(3, 2), torch.randn(1, 2)).backend)"
    assert in_fresh_process(code, BYOL_FAST_BACKEND="reference").stdout.strip() == "reference"
    failed = in_fresh_process(code, BYOL_FAST_BACKEND="nativ")
    assert failed.returncode != 0
    message = "BYOL_FAST_BACKEND: expected one of auto, reference, native, gram, triton, cuda, got 'nativ'"
    assert message in failed.stderr
    failed = in_fresh_process(code, BYOL_FAST_BACKEND="cuda")
    assert "BYOL_FAST_BACKEND: backend 'cuda' cannot run here" in failed.stderr


@pytest.mark.skipif(not NATIVE, reason="there is no native core in this installation")
def test_instruction_set_variable() -> None:
    from byol_fast.backends.native import Native

    sets = Native().info()["runnable_instruction_sets"]
    assert "portable" in sets
    code = "from byol_fast.backends.native import Native; print(Native().info()['instruction_set'])"
    for name in sets:
        assert in_fresh_process(code, BYOL_FAST_CPU=name).stdout.strip() == name
    code = "import byol_fast as bf; print(bf.backends()['native'])"
    result = in_fresh_process(code, BYOL_FAST_CPU="mmx")
    assert f"BYOL_FAST_CPU: expected one of {', '.join(sets)} on this processor, got 'mmx'" in result.stdout


def test_import_starts_no_threads() -> None:
    code = (
        "import torch, threading, os\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "import byol_fast\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    assert in_fresh_process(code).stdout.strip() == "0"


def _child(queue: multiprocessing.Queue[float], operands: Operands) -> None:
    queue.put(operands.call(bf.bottleneck_mse_loss).item())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not NATIVE, reason="there is no native core in this installation")
def test_forked_child_after_the_parent_used_the_kernels() -> None:
    operands = make_operands(3001, 199, 41)
    expected = operands.call(bf.bottleneck_mse_loss).item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, operands), daemon=True)
    process.start()
    assert queue.get(timeout=60) == expected
    process.join(timeout=60)
    assert process.exitcode == 0


@pytest.mark.skipif(not NATIVE, reason="there is no native core in this installation")
def test_plain_threads_give_the_same_bits_as_torchs_pool() -> None:
    code = (
        "import torch, byol_fast as bf; torch.set_num_threads(2); torch.manual_seed(0)\n"
        "x, w = torch.randn(3000, 200), torch.randn(20, 200, requires_grad=True)\n"
        "loss = bf.bottleneck_mse_loss(x, w); loss.backward()\n"
        "from byol_fast.backends.native import Native\n"
        "print(Native().info()['thread_pool'], loss.item(), w.grad.double().sum().item())"
    )
    plain, pooled = in_fresh_process(code, BYOL_FAST_THREADS="std"), in_fresh_process(code)
    assert plain.stdout.split()[0] == "std::thread"
    assert plain.stdout.split()[1:] == pooled.stdout.split()[1:]
