"""Results of 32 MiB and more: written past the caches, into memory that is kept (csrc/cpu/stream.h, memory.h)."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from contract import make_operands
from sweeps import check_layer, check_step
from torch import Tensor

import byol_fast as bf

pytestmark = pytest.mark.skipif(
    not bf.backends()["native"].available, reason="there is no native core in this installation"
)
# Rows of 1031 numbers begin anywhere in a vector.
FEATURES, RANK = 1031, 5
ROWS = {torch.float32: 8207, torch.bfloat16: 16301}


@pytest.fixture(autouse=True)
def native() -> object:
    with bf.use_backend("native"):
        yield


@pytest.mark.parametrize("dtype", ROWS, ids=str)
def test_contract_of_the_layer(dtype: torch.dtype) -> None:
    check_layer(make_operands(ROWS[dtype], FEATURES, RANK, FEATURES, dtype=dtype, target=True), residual=True)


@pytest.mark.parametrize("target", [False, True], ids=["input", "target"])
def test_contract_of_the_gradients_of_the_data(target: bool) -> None:
    check_step(make_operands(ROWS[torch.float32], FEATURES, RANK, FEATURES, target=target), reduction="sum")


def large() -> Tensor:
    operands = make_operands(ROWS[torch.float32], FEATURES, RANK, FEATURES, target=True)
    return bf.bottleneck(operands.input, operands.encoder_weight, operands.decoder_weight)


def test_a_result_is_a_tensor_like_any_other() -> None:
    operands = make_operands(ROWS[torch.float32], FEATURES, RANK, FEATURES, target=True)
    weight = operands.encoder_weight.requires_grad_()
    output = bf.bottleneck(operands.input, weight, operands.decoder_weight)
    assert output.is_contiguous()
    expected = 2 * output.detach().clone()
    assert torch.equal(output.mul_(2), expected)
    output.sum().backward()
    assert weight.grad is not None


def test_memory_is_used_again_once_nobody_has_it() -> None:
    first = large()
    second = large()
    addresses = {first.data_ptr(), second.data_ptr()}
    assert len(addresses) == 2, "two results share their memory"
    view, values = first[7:9], first[7:9].clone()
    del first
    gc.collect()
    third = large()
    assert third.data_ptr() not in addresses, "memory was taken from a tensor of which there is a view"
    assert torch.equal(view, values)
    addresses.add(third.data_ptr())
    del view, second, third
    gc.collect()
    assert large().data_ptr() in addresses, "memory was mapped anew"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell what is resident")
def test_memory_that_is_kept_can_be_released() -> None:
    from byol_fast import _native

    large()
    gc.collect()
    before = resident_bytes()
    _native.release_memory()
    assert before - resident_bytes() > 30 * 2**20, "a result of 32 MiB is still there"
    assert large().isfinite().all()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
