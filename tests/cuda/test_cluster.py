"""The single-pass step: its planning, its layouts, and the kernel itself, emulated: all blocks of a cluster at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from contract import FLOOR, Operands, make_operands, relative_error, results
from sweeps import check_step

import byol_fast as bf
from byol_fast import reference
from byol_fast.backends.base import Weights
from byol_fast.backends.cuda import Cuda


@pytest.mark.parametrize(
    ("features", "rank", "cluster"),
    [(1, 1, 1), (512, 32, 1), (513, 32, 2), (1024, 16, 2), (2048, 32, 4), (4096, 32, 8), (8192, 32, 16)],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_smallest_cluster_that_holds_all_columns(
    emulated: Cuda, features: int, rank: int, cluster: int, tied: bool
) -> None:
    # Tied weights have one product of twice the width.
    rank *= 1 + tied
    planned, clusters, tiles = emulated._module.plan_cluster(65536, features, rank, tied, 132)
    assert planned == cluster
    assert tiles == 1024
    # As many clusters as run at a time, and none that a tile is missing for.
    assert clusters == min(132 // cluster, tiles)
    assert emulated._module.plan_cluster(100, features, rank, tied, 132)[1] == min(132 // cluster, 2)


@pytest.mark.parametrize(
    ("features", "rank", "tied", "processors"),
    [(8193, 32, False, 132), (1024, 33, False, 132), (1024, 65, True, 132), (8192, 32, False, 15)],
)
def test_what_does_not_fit_takes_two_passes(
    emulated: Cuda, features: int, rank: int, tied: bool, processors: int
) -> None:
    assert emulated._module.plan_cluster(65536, features, rank, tied, processors)[0] == 0


def test_the_swizzle_is_a_permutation_without_bank_conflicts(emulated: Cuda) -> None:
    swizzled = emulated._module.swizzled
    places = {swizzled(row, column) for row in range(64) for column in range(128)}
    assert places == set(range(0, 2 * 64 * 128, 2))
    # Eight rows of one column of pieces lie in eight different groups of four banks.
    for column in range(0, 64, 8):
        assert len({swizzled(row, column) % 128 // 16 for row in range(8)}) == 8


def test_eight_rows_of_a_fragment_lie_in_different_banks(emulated: Cuda) -> None:
    slot_byte = emulated._module.slot_byte
    assert {slot_byte(row, column) for row in range(64) for column in range(64)} == set(range(0, 4 * 64 * 64, 4))
    # Half of a warp reads 8 bytes a lane, of four rows: all banks, once.
    for rows in (range(4), range(4, 8)):
        for column in range(0, 64, 8):
            pieces = [slot_byte(row, column + 2 * lane) % 128 // 8 for row in rows for lane in range(4)]
            assert sorted(pieces) == list(range(16))


def test_the_descriptor_has_its_fields_where_the_manual_says(emulated: Cuda) -> None:
    descriptor = emulated._module.wgmma_descriptor(0x12340)
    assert descriptor & 0x3FFF == 0x12340 >> 4
    assert descriptor >> 32 & 0x3FFF == 1024 >> 4
    assert descriptor >> 62 == 1


@pytest.fixture
def single_pass(cuda: str, emulated: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "single_pass", True)


@pytest.fixture
def processors(emulated: Cuda, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the emulated GPU have so many multiprocessors."""
    module = emulated._module

    def have(count: int) -> None:
        def counted(where: tuple[int, int, int, bool], *arguments: object) -> int:
            size: int = module.step((*where[:2], count, where[3]), *arguments)
            return size

        monkeypatch.setattr(emulated, "_module", SimpleNamespace(**{**vars(module), "step": counted}))

    return have


# Columns of one block, of two, of a third that has few and a fourth that has none; rows that end within a tile.
@pytest.mark.parametrize(
    ("shape", "dtype", "tied"),
    [
        ((70, 64, 5), torch.float16, False),
        ((130, 520, 32), torch.bfloat16, False),
        ((66, 72, 29), torch.bfloat16, True),
        ((70, 64, 33), torch.float16, True),
        ((130, 520, 64), torch.bfloat16, True),
        ((64, 1032, 17), torch.bfloat16, False),
        ((64, 1032, 41), torch.bfloat16, True),
    ],
    ids=str,
)
def test_single_pass(single_pass: None, dtype: torch.dtype, shape: tuple[int, int, int], tied: bool) -> None:
    operands = make_operands(*shape, dtype=dtype, tied=tied, ratio=1e-2)
    check_step(operands, activation="tanh", reduction="sum")


# Where a block owns fewer rows than a warp makes at a time.
@pytest.mark.parametrize(("cluster", "tied"), [(8, False), (8, True), (16, False), (16, True)])
def test_large_clusters(single_pass: None, processors: Callable[[int], None], cluster: int, tied: bool) -> None:
    processors(cluster)
    rows, features, rank = 64 + 3, 256 * cluster + 8, 64 if tied else 32
    weights = [torch.randn(rank, features) / features**0.5, torch.randn(features, rank) / rank**0.5]
    if tied:
        weights = [torch.linalg.qr(weights[1]).Q.T, None]
    operands = Operands(torch.randn(rows, features), *weights, 0.1 * torch.randn(rank), 0.1 * torch.randn(features))
    operands = operands.map(lambda tensor: tensor.to(torch.bfloat16))
    check_step(operands, reduction="sum")


@pytest.mark.parametrize("needs", ["encoder_weight", "decoder_weight"])
def test_each_gradient_alone_is_the_same(single_pass: None, needs: str) -> None:
    operands = make_operands(rows=70, in_features=64, rank=9, dtype=torch.bfloat16, ratio=1e-1)
    alone, everything = (results(bf.bottleneck_mse_loss, operands, wanted) for wanted in ([needs], None))
    assert all(torch.equal(alone[name], everything[name]) for name in alone)


@pytest.mark.parametrize(("rank", "tied"), [(20, False), (50, True)])
def test_single_pass_and_two_passes_agree(
    single_pass: None, emulated: Cuda, monkeypatch: pytest.MonkeyPatch, rank: int, tied: bool
) -> None:
    operands = make_operands(rows=300, in_features=72, rank=rank, dtype=torch.bfloat16, ratio=1e-1, tied=tied)
    once = results(bf.bottleneck_mse_loss, operands)
    monkeypatch.setattr(emulated, "single_pass", False)
    twice = results(bf.bottleneck_mse_loss, operands)
    for name in once:
        assert (once[name] - twice[name]).norm() <= 4e-3 * twice[name].norm(), name


@pytest.mark.parametrize("passes", [1, 2])
def test_the_rounding_of_v_is_multiplied_with_the_residual_alone(
    single_pass: None, emulated: Cuda, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """Multiplied with the input it would be an error of 3e-2 here, and within the contract: eager's is as large."""
    monkeypatch.setattr(emulated, "single_pass", passes == 1)
    operands = make_operands(in_features=136, rank=40, dtype=torch.bfloat16, tied=True, ratio=1e-4)
    truth = results(reference.bottleneck_mse_loss, operands.map(torch.Tensor.double), ["encoder_weight"])
    ours = results(bf.bottleneck_mse_loss, operands, ["encoder_weight"])
    assert relative_error(ours["d_encoder_weight"], truth["d_encoder_weight"]) <= FLOOR[torch.bfloat16]


def test_sums_begin_afresh_every_4096_rows(
    single_pass: None, emulated: Cuda, processors: Callable[[int], None]
) -> None:
    """Then those of all rows are, to the last bit, those of the first 4096 and of the rest, added in float32."""
    processors(1)
    operands = make_operands(rows=4096 + 64, in_features=16, rank=3, dtype=torch.bfloat16)
    weights = Weights(*(getattr(operands, name) for name in Operands.NAMES[1:5]))

    def encoder_gradient(rows: torch.Tensor) -> torch.Tensor:
        gradient = emulated.step(rows, None, weights, "identity", (True, False, False, False), False, 1.0)[1]
        assert gradient is not None
        return gradient

    x = operands.input
    assert torch.equal(encoder_gradient(x), encoder_gradient(x[:4096]) + encoder_gradient(x[4096:]))


@pytest.mark.parametrize(("rank", "tied"), [(20, False), (50, True)])
def test_single_pass_does_not_depend_on_the_order_of_threads(
    single_pass: None, monkeypatch: pytest.MonkeyPatch, rank: int, tied: bool
) -> None:
    operands = make_operands(rows=130, in_features=520, rank=rank, dtype=torch.bfloat16, tied=tied)
    forward = results(bf.bottleneck_mse_loss, operands)
    monkeypatch.setenv("EMULATOR_ORDER", "backward")
    backward = results(bf.bottleneck_mse_loss, operands)
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


def test_nan_in_nan_out(single_pass: None) -> None:
    operands = make_operands(rows=70, in_features=64, rank=5, dtype=torch.bfloat16)
    spoiled = operands.input.clone()
    spoiled[69, 63] = float("nan")
    assert replace(operands, input=spoiled).call(with_gradients).isnan()


def with_gradients(*args: torch.Tensor) -> torch.Tensor:
    return bf.bottleneck_mse_loss(args[0], *(arg.clone().requires_grad_() for arg in args[1:])).detach()
