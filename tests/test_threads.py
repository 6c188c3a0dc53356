"""Threads, processes, pages: callers in parallel, changes of the thread count, forks, workers of a DataLoader."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from contract import make_operands, results
from torch.utils.data import DataLoader, Dataset

import byol_fast as bf
from byol_fast.backends import native

needs_native = pytest.mark.skipif(
    not bf.backends()["native"].available, reason="there is no native core in this installation"
)


@pytest.fixture(autouse=True)
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(seed: int) -> dict[str, torch.Tensor]:
    """Loss and all gradients on operands of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(601, 61, generator=generator, requires_grad=True)
    weight = torch.randn(13, 61, generator=generator, requires_grad=True)
    bias = torch.randn(61, generator=generator, requires_grad=True)
    loss = bf.bottleneck_mse_loss(x, weight, None, None, bias, activation="gelu")
    gradients = torch.autograd.grad(loss, (x, weight, bias))
    return dict(zip(("loss", "d_input", "d_weight", "d_bias"), (loss.detach(), *gradients), strict=True))


def assert_same_bits(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in expected:
        assert torch.equal(ours[name], expected[name]), f"{name} has other bits"


@needs_native
def test_callers_in_parallel_do_not_disturb_each_other() -> None:
    callers, rounds = 4, 10
    with bf.use_backend("native"):
        alone = [step(seed) for seed in range(callers)]
        barrier = Barrier(callers)

        def caller(seed: int) -> list[dict[str, torch.Tensor]]:
            torch.set_num_threads(2)
            barrier.wait(timeout=60)
            return [step(seed) for _ in range(rounds)]

        torch.set_num_threads(2)
        alone = [step(seed) for seed in range(callers)]
        with ThreadPoolExecutor(callers) as pool:
            together = list(pool.map(caller, range(callers)))
    for expected, got in zip(alone, together, strict=True):
        for again in got:
            assert_same_bits(again, expected)


@needs_native
def test_the_thread_count_may_change_between_forward_and_backward() -> None:
    operands = make_operands(1009, 61, 7)
    with bf.use_backend("native"):
        torch.set_num_threads(2)
        expected = results(bf.bottleneck_mse_loss, operands)
        for other in (1, 3, 64):
            leaves = operands.map(lambda t: t.clone().requires_grad_())
            loss = leaves.call(bf.bottleneck_mse_loss)
            torch.set_num_threads(other)
            loss.backward()
            torch.testing.assert_close(leaves.input.grad, expected["d_input"])
            torch.set_num_threads(2)
            # Back at the old count, the old bits are back too.
            assert_same_bits(results(bf.bottleneck_mse_loss, operands), expected)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
def test_any_thread_count_writes_every_result(threads: int) -> None:
    with bf.use_backend("native"):
        for rows in (1, 2, 63):
            operands = make_operands(rows, 5, 3, target=True)
            torch.set_num_threads(1)
            expected = results(bf.bottleneck_mse_loss, operands)
            torch.set_num_threads(threads)
            ours = results(bf.bottleneck_mse_loss, operands)
            for name in expected:
                torch.testing.assert_close(ours[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


class Steps(Dataset[torch.Tensor]):
    """Each item runs the kernels in the process that asks for it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return step(index)["d_weight"]


@needs_native
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(context: str) -> None:
    torch.set_num_threads(1)
    # The parent's threads exist before the workers are forked; each worker has one thread, as DataLoader sets.
    expected = [step(index)["d_weight"] for index in range(4)]
    torch.set_num_threads(2)
    step(0)
    loader = DataLoader(Steps(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=60)
    for got, want in zip(loader, expected, strict=True):
        assert torch.equal(got, want)


@needs_native
@pytest.mark.parametrize("pool", ["", "std"], ids=["torch's pool", "plain threads"])
def test_fork_keeps_the_thread_count_and_the_bits(pool: str) -> None:
    code = (
        "import os, torch, byol_fast as bf\n"
        "torch.set_num_threads(2); torch.manual_seed(0)\n"
        "x, w = torch.randn(3000, 40), torch.randn(5, 40, requires_grad=True)\n"
        "def bits(): return torch.autograd.grad(bf.bottleneck_mse_loss(x, w), w)[0].numpy().tobytes()\n"
        "before = bits()\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if bits() == before and bits() == before else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), bits() == before)"
    )
    import os

    environment = {**os.environ, "BYOL_FAST_BACKEND": "native", "BYOL_FAST_THREADS": pool}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "True"], done.stderr


@needs_native
def test_results_in_large_pages_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make_operands(601, 61, 13, target=True)
    with bf.use_backend("native"):
        for function in (bf.bottleneck, bf.bottleneck_mse_loss):
            given = operands if function is bf.bottleneck_mse_loss else replace(operands, target=None)
            expected = results(function, given)
            monkeypatch.setattr(native, "_LARGE", 1)
            assert_same_bits(results(function, given), expected)
            monkeypatch.undo()
