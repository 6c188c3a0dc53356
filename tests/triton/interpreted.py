"""The Triton kernels in the interpreter, on CPU tensors: what the contract tests of all backends do not reach.

Run by test_interpreter.py in a process of its own, for Triton decides at import whether it interprets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from contract import ACTIVATIONS, Operands, assert_all, assert_contract, make_operands, relative_error, results
from sweeps import check_layer, step_with_activation
from torch.utils._python_dispatch import TorchDispatchMode
from triton import OutOfResources

import byol_fast as bf
from byol_fast import reference
from byol_fast.backends.triton import config, launch, tune

# The tensors in the order of a backend's arguments.
ORDER = ("input", "target", "encoder_weight", "decoder_weight", "encoder_bias", "decoder_bias")
# Ranks of every width of a tile, ragged; columns beyond one float32 sum of pass 1.
SHAPES = [(5, 70, 1), (67, 530, 16), (130, 40, 33)]


@pytest.fixture(autouse=True)
def _backend() -> None:
    bf.use_backend("triton")


def check(operands: Operands, **options: object) -> None:
    assert_all(bf.bottleneck_mse_loss, reference.bottleneck_mse_loss, operands, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ragged_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make_operands(*shape, dtype=dtype), reduction="sum")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    step_with_activation(activation, torch.float32, rows=40, in_features=30, rank=5)
    check_layer(make_operands(40, 30, 5, activation=activation), activation=activation)


# What is asked for decides what the kernels store, and which of them run.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "needs",
    [("encoder_weight",), ("decoder_weight", "decoder_bias"), ("input",), ("target",), ("input", "target")],
    ids=str,
)
def test_some_gradients_without_the_others(needs: tuple[str, ...], dtype: torch.dtype) -> None:
    operands = make_operands(40, 20, 5, dtype=dtype, target=True)
    check(operands, needs=needs, reduction="sum")
    if "target" not in needs:
        check(replace(operands, target=None), needs=needs, reduction="sum")
        check_layer(operands, needs=needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_without_gradients(dtype: torch.dtype) -> None:
    operands = make_operands(70, 40, 5, dtype=dtype)
    for ours, theirs in (
        (bf.bottleneck_mse_loss, reference.bottleneck_mse_loss),
        (bf.bottleneck, reference.bottleneck),
    ):
        eager, truth = operands.call(theirs), operands.map(torch.Tensor.double).call(theirs)
        assert_contract(operands.call(ours), eager, truth, ours.__name__)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_target_in_half_precision(dtype: torch.dtype) -> None:
    check(make_operands(70, 40, 5, 30, dtype=dtype, target=True, ratio=1e-2), reduction="sum")


def test_more_columns_than_one_share_of_a_target() -> None:
    check(make_operands(40, 40, 9, 530, target=True))


def test_rows_beyond_one_float32_sum_of_pass_2(monkeypatch: pytest.MonkeyPatch) -> None:
    # One share, so that its program begins afresh and adds to what it stored.
    monkeypatch.setattr(launch, "_MAX_SPLITS", 1)
    check(make_operands(4096 + 70, 20, 5, dtype=torch.bfloat16), reduction="sum")


def test_some_tiles_direct_and_others_not() -> None:
    # Rows that the bottleneck reproduces to 1e-6 beside rows that it misses.
    near, far = make_operands(128, 60, 7, ratio=1e-6), make_operands(128, 60, 7, ratio=1.0)
    operands = replace(near, input=torch.cat([near.input, far.input]))
    for tied in (False, True):
        check(replace(operands, decoder_weight=None) if tied else operands)


def test_the_widest_code() -> None:
    check(make_operands(33, 70, 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [config.MAX_RANK, config.MAX_RANK + 1])
def test_explain_tells_of_the_gram_route(rank: int, dtype: torch.dtype) -> None:
    form = make_operands(64, 300, rank, dtype=dtype).call(bf.explain).form  # type: ignore[arg-type, attr-defined]
    in_kernels = rank <= config.MAX_RANK and dtype == torch.float32
    assert ("direct for row tiles" in form) == in_kernels
    assert ("by PyTorch's products (its kernels are for dense float32" in form) != in_kernels


def test_a_rank_beyond_the_kernels_takes_the_gram_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_run", None)
    check(make_operands(64, 300, config.MAX_RANK + 1))


def to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)


class EagerInTf32(TorchDispatchMode):
    """PyTorch's products as a GPU makes them where the settings allow tf32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            args = (*args[:-2], *map(to_tf32, args[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tf32_keeps_the_contract_beside_eager_in_tf32(ratio: float, tied: bool) -> None:
    operands = make_operands(200, 90, 11, ratio=ratio, tied=tied)
    ours = results(bf.bottleneck_mse_loss, operands, reduction="sum")
    with EagerInTf32():
        eager = results(reference.bottleneck_mse_loss, operands, reduction="sum")
    truth = results(reference.bottleneck_mse_loss, operands.map(torch.Tensor.double), reduction="sum")
    for name in ours:
        assert_contract(ours[name], eager[name], truth[name], name)


@pytest.mark.usefixtures("tf32")
def test_tf32_rounds_each_operand_once() -> None:
    """The loss is that of the rounded operands to float32's accuracy: ‖a‖², G and Q see the same numbers."""
    operands = make_operands(200, 90, 11, ratio=1e-2, bias=False)
    ours = results(bf.bottleneck_mse_loss, operands)
    truth = results(reference.bottleneck_mse_loss, operands.map(to_tf32).map(torch.Tensor.double))
    assert relative_error(ours["output"], truth["output"]) < 2e-6
    for name in ("d_encoder_weight", "d_decoder_weight"):
        # The code and its gradient are rounded, too: 2⁻¹² of them, over the residual, which is a tenth of the rows.
        assert relative_error(ours[name], truth[name]) < 1e-3, name


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_tf32_only_where_the_settings_allow_it(setting: str) -> None:
    x = torch.empty(1)
    assert launch._precision(x)["PRECISION"] == "ieee"
    torch.set_float32_matmul_precision(setting)
    try:
        assert launch._precision(x) == {"TF32": True, "PRECISION": "tf32", "EXACT": "bf16x6"}
        assert not launch._precision(x.half())["TF32"]
        assert "direct" not in bf.explain(x[None], x[None], x[None]).form
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not launch._precision(x)["TF32"]


def test_padding_of_rows_and_ranks_is_not_read() -> None:
    # Rows and ranks between NaNs: what lies outside the matrices must not count.
    operands = make_operands(37, 41, 5, target=True, out_features=19)

    def inside(tensor: torch.Tensor) -> torch.Tensor:
        padded = torch.full([size + 40 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
        view = padded[tuple(slice(20, 20 + size) for size in tensor.shape)]
        return view.copy_(tensor)

    ours = operands.map(inside).call(bf.bottleneck_mse_loss)
    torch.testing.assert_close(ours, operands.call(reference.bottleneck_mse_loss))


def test_offsets_beyond_two_to_the_31() -> None:
    # One row of storage seen as many, 2³⁰ elements apart, would need terabytes: the second row lies 2³¹ + 8 further on.
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    x = storage.as_strided((2, 16), (2**31 + 8, 1))
    x.copy_(torch.randn(2, 16))
    operands = replace(make_operands(2, 16, 3, dtype=torch.bfloat16), input=x)
    leaves = operands.map(torch.Tensor.contiguous)
    assert torch.equal(operands.call(bf.bottleneck_mse_loss), leaves.call(bf.bottleneck_mse_loss))
    assert torch.equal(operands.call(bf.bottleneck), leaves.call(bf.bottleneck))


def test_launches_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, small batches are bound by launches: prepare, pass 1, pass 2, finish."""
    names: list[str] = []
    run = launch._run

    def counted(kernel, *args, **options):  # type: ignore[no-untyped-def]
        names.append(kernel.__name__)
        run(kernel, *args, **options)

    monkeypatch.setattr(launch, "_run", counted)
    operands = make_operands(40, 30, 4).map(lambda tensor: tensor.requires_grad_())
    loss = operands.call(bf.bottleneck_mse_loss)
    assert names == ["prepare", "encode", "collect", "finish"]
    loss.backward()
    assert names[4:] == ["data_gradients"]


def test_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows with the rows is Z and dU in the dtype of X, and a partial sum a tile."""
    allocate = torch.Tensor.new_empty

    def bytes_for(rows: int) -> int:
        sizes: list[int] = []

        def counted(*args: object, **options: object) -> torch.Tensor:
            tensor = allocate(*args, **options)  # type: ignore[arg-type]
            sizes.append(tensor.nbytes)
            return tensor

        operands = make_operands(rows, 20, 8, dtype=torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", counted)
            launch.step(*(getattr(operands, name) for name in ORDER), "identity", True, False)
        return sum(sizes)

    tile = config.config(8, half=True).encode.rows
    assert bytes_for(8 * tile) - bytes_for(4 * tile) == 4 * (tile * 2 * 8 * 2 + 8 * 4 + 8)


@pytest.fixture
def autotuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "ENABLED", True)
    monkeypatch.setattr(tune, "_fastest", {})


@pytest.mark.usefixtures("autotuning")
def test_autotuning_keeps_the_fastest_of_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make_operands(70, 40, 5)
    table = config.config(5, half=False)
    wanted = replace(table, encode=replace(table.encode, warps=table.encode.warps // 2))
    tried: list[config.Config] = []

    def seconds(call: object, candidate: config.Config, x: torch.Tensor) -> float:
        tried.append(candidate)
        if candidate.encode.rows > table.encode.rows:
            raise RuntimeError("out of shared memory")
        return 1.0 if candidate == wanted else 2.0

    monkeypatch.setattr(tune, "_seconds", seconds)
    check(operands)
    assert list(tune._fastest.values()).count(wanted) == 1
    # What follows is changed beside the best so far, and a class that is known is not timed again.
    assert {candidate.encode for candidate in tried if candidate.collect != table.collect} == {wanted.encode}
    count = len(tried)
    check(operands)
    assert len(tried) == count


@pytest.mark.usefixtures("autotuning")
def test_autotuning_is_right_in_every_configuration_it_may_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    # The last is the fastest, so that every kernel ends in a configuration that the table does not have.
    order = iter(range(10**6, 0, -1))
    monkeypatch.setattr(tune, "_seconds", lambda call, candidate, x: float(next(order)))
    operands = make_operands(90, 70, 5, ratio=1e-6)
    check(operands)
    assert_all(bf.bottleneck, reference.bottleneck, operands)
    chosen = list(tune._fastest.values())
    assert len(chosen) >= 4
    assert config.config(5, half=False) not in chosen


@pytest.mark.usefixtures("autotuning")
def test_autotuning_times_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_RUNS", 1)
    check(make_operands(20, 18, 3), reduction="sum")
    assert tune._fastest


def test_without_being_asked_nothing_is_tuned() -> None:
    assert not tune.ENABLED
    check(make_operands(20, 18, 3))
    assert tune._fastest == {}


def test_out_of_memory_is_pytorch_s_error_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make_operands(40, 30, 4)
    expected = operands.call(bf.bottleneck_mse_loss)
    run = launch._run

    def exhausted(kernel, *args, **options):  # type: ignore[no-untyped-def]
        if kernel.__name__ == "encode":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.")
        run(kernel, *args, **options)

    monkeypatch.setattr(launch, "_run", exhausted)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        operands.call(bf.bottleneck_mse_loss)
    monkeypatch.setattr(launch, "_run", run)
    assert torch.equal(operands.call(bf.bottleneck_mse_loss), expected)


def test_a_gpu_with_too_little_shared_memory_is_told_so() -> None:
    class Kernel:
        __name__ = "encode"

        def __getitem__(self, grid: object) -> object:
            def launched(*arguments: object, **options: object) -> None:
                raise OutOfResources(120_000, 101_376, "shared memory")

            return launched

    message = r"^backend 'triton': kernel encode needs 120000 of shared memory, and this GPU has 101376; .*'gram'"
    with pytest.raises(RuntimeError, match=message):
        launch._run(Kernel(), (1,), config.Launch(64, 64, 4, 2))
