"""The registry: status, choice, errors, environment, forks."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from contract import Operands, make_operands

import byol_fast as bf
from byol_fast import reference
from byol_fast.backends import Call, Weights, kernels
from byol_fast.backends.crossovers import Crossovers

NATIVE = bf.backends()["native"].available
needs_native = pytest.mark.skipif(not NATIVE, reason="there is no native core in this installation")


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


@needs_native
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


@needs_native
def test_native_sums_over_no_rows_are_zero() -> None:
    operands, native = make_operands(0, 5, 2), kernels("native")
    weights = Weights(operands.encoder_weight, operands.decoder_weight, operands.encoder_bias, operands.decoder_bias)
    step = native.step(operands.input, None, weights, "identity", [True] * 4, False, 1.0)[:5]
    grad, code = torch.empty(0, 5), torch.empty(0, 2)
    layer = native.bottleneck_backward(grad, operands.input, weights, code, "identity", False, [False] + [True] * 4)
    assert not any(result.any() for result in [*step, *layer[1:]])


@pytest.mark.parametrize("instruction_set", ["amx", "avx512_bf16", "avx2"])
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((65536, 256, 8), torch.float32, None),
        ((16, 256, 8), torch.float32, "PyTorch is faster on so small a product"),
        ((512, 1024, 256), torch.float32, "PyTorch is faster on fewer rows than "),
        ((65536, 64, 96), torch.float32, "PyTorch is faster on fewer features than "),
        ((4096, 512, 64), torch.float16, None),
    ],
    ids=str,
)
def test_rules_for_pytorch(
    instruction_set: str, shape: tuple[int, int, int], dtype: torch.dtype, reason: str | None
) -> None:
    rules, (rows, features, rank) = Crossovers(instruction_set), shape
    call = Call("bottleneck_mse_loss", dtype, rows, features, features, rank, gradients=True)
    found = rules.reason_for_pytorch(call)
    assert found is None if reason is None else found is not None and found.startswith(reason)


@pytest.mark.parametrize(
    ("instruction_set", "shape", "reason"),
    [
        ("avx2", (1024, 1024, 256), "PyTorch is faster on fewer rows than "),
        ("avx2", (65536, 64, 48), "PyTorch is faster on fewer features than "),
        ("avx512_bf16", (65536, 64, 48), "PyTorch is faster on fewer features than "),
    ],
)
def test_rules_for_pytorch_that_tiles_do_not_need(
    instruction_set: str, shape: tuple[int, int, int], reason: str
) -> None:
    rows, features, rank = shape
    call = Call("bottleneck_mse_loss", torch.float32, rows, features, features, rank, gradients=True)
    found = Crossovers(instruction_set).reason_for_pytorch(call)
    assert (found or "").startswith(reason)
    assert Crossovers("amx").reason_for_pytorch(call) is None


@pytest.mark.parametrize(("instruction_set", "enough"), [("amx", 32), ("avx512_bf16", 256)])
def test_a_layer_is_the_kernels_for_its_rank_or_its_outputs(instruction_set: str, enough: int) -> None:
    rules = Crossovers(instruction_set)
    for rows, rank, native in ((4096, enough - 16, False), (4096, enough, True), (8192, enough - 16, True)):
        call = Call("bottleneck", torch.float32, rows, 1024, 1024, rank)
        assert (rules.reason_for_pytorch(call) is None) == native


def test_bfloat16_goes_to_pytorch_only_where_it_has_products() -> None:
    call = Call("bottleneck_mse_loss", torch.bfloat16, 256, 512, 512, 64, gradients=True)
    assert Crossovers("avx512_bf16").reason_for_pytorch(call) == "PyTorch is faster on fewer rows than 8·rank"
    assert Crossovers("avx2").reason_for_pytorch(call) is None


@pytest.mark.parametrize("instruction_set", ["amx", "avx512", "avx2"])
def test_what_is_small_is_small_for_every_operation(instruction_set: str) -> None:
    rules, sizes = Crossovers(instruction_set), (1, 30, 300, 3000)
    for dtype, rows, features, rank in itertools.product((torch.float32, torch.bfloat16), sizes, sizes, sizes):
        small = rules.is_small(dtype, rows, features, features, rank)
        reasons = [
            rules.reason_for_pytorch(Call(operation, dtype, rows, features, features, rank, gradients=gradients))
            for operation in ("bottleneck", "bottleneck_mse_loss")
            for gradients in (False, True)
        ]
        assert not small or None not in reasons, (dtype, rows, features, rank)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_a_small_call_is_pytorchs_to_the_bit(tied: bool, residual: bool) -> None:
    operands = make_operands(6, 5, 3, tied=tied).map(lambda t: t.requires_grad_())
    options = {"activation": "gelu", "residual": residual}
    assert torch.equal(operands.call(bf.bottleneck, **options), operands.call(reference.bottleneck, **options))
    for reduction in ("mean", "sum", "none"):
        ours, theirs = (
            operands.call(function, activation="relu", reduction=reduction)
            for function in (bf.bottleneck_mse_loss, reference.bottleneck_mse_loss)
        )
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(loss.sum(), operands.encoder_weight)[0] for loss in (ours, theirs)]
        assert torch.equal(*gradients)


@needs_native
def test_explain_tells_why_pytorch_is_taken() -> None:
    small = make_operands(16, 256, 8).call(bf.explain)  # type: ignore[arg-type]
    assert (small.backend, small.reason) == ("reference", "native: PyTorch is faster on so small a product")
    large = make_operands(8192, 256, 8).call(bf.explain)  # type: ignore[arg-type]
    assert (large.backend, large.reason) == ("native", "measured fastest on such calls")


def test_environment_variable() -> None:
    code = "import torch, byol_fast as bf; print(bf.explain(torch.randn(3, 2), torch.randn(1, 2)).backend)"
    assert in_fresh_process(code, BYOL_FAST_BACKEND="reference").stdout.strip() == "reference"
    failed = in_fresh_process(code, BYOL_FAST_BACKEND="nativ")
    assert failed.returncode != 0
    message = "BYOL_FAST_BACKEND: expected one of auto, reference, native, gram, triton, cuda, got 'nativ'"
    assert message in failed.stderr
    failed = in_fresh_process(code, BYOL_FAST_BACKEND="cuda")
    assert "BYOL_FAST_BACKEND: backend 'cuda' cannot run here" in failed.stderr


@needs_native
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


def _native_loss(operands: Operands) -> float:
    with bf.use_backend("native"):
        return operands.call(bf.bottleneck_mse_loss).item()


def _child(queue: multiprocessing.Queue[float], operands: Operands) -> None:
    queue.put(_native_loss(operands))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@needs_native
def test_forked_child_after_the_parent_used_the_kernels() -> None:
    operands = make_operands(3001, 199, 41)
    expected = _native_loss(operands)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, operands), daemon=True)
    process.start()
    assert queue.get(timeout=60) == expected
    process.join(timeout=60)
    assert process.exitcode == 0


@needs_native
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
