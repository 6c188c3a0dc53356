"""bottleneck_mse_loss: the accuracy contract over residual ratios, dtypes, activations, shapes and strides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    RATIOS,
    Operands,
    assert_all,
    assert_contract,
    make_operands,
    results,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import (
    check_step,
    same_bits,
    step_at_ratio,
    step_of_shape,
    step_with_a_target_at_ratio,
    step_with_activation,
    step_with_code_means,
)

import byol_fast as bf
from byol_fast import reference


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_contract_over_residual_ratios(backend: str, dtype: torch.dtype, tied: bool, ratio: float) -> None:
    step_at_ratio(dtype, tied, ratio)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_over_residual_ratios_with_a_target(backend: str, dtype: torch.dtype, ratio: float) -> None:
    step_with_a_target_at_ratio(dtype, ratio)


@pytest.mark.parametrize("ratio", [1.0, 1e-4])
@pytest.mark.parametrize("target", [False, True], ids=["itself", "target"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_contract_over_activations(
    backend: str, activation: str, tied: bool, bias: bool, target: bool, ratio: float
) -> None:
    operands = make_operands(tied=tied, bias=bias, target=target, activation=activation, ratio=ratio)
    check_step(operands, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_contract_over_activations_and_dtypes(backend: str, activation: str, dtype: torch.dtype) -> None:
    step_with_activation(activation, dtype)


@pytest.mark.parametrize("cut", [[900, 2600], [0, 700, 1400], [0, 3001]], ids=str)
@pytest.mark.parametrize("target", [False, True], ids=["itself", "target"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_form_is_chosen_anew_as_rows_change(
    backend: str, dtype: torch.dtype, tied: bool, target: bool, cut: list[int]
) -> None:
    """Rows that are reproduced nearly exactly, between each second pair of cuts, among rows that are not."""
    operands = make_operands(3001, 99, 21, dtype=torch.float64, tied=tied, target=target, ratio=1e-5)
    goal = operands.input if operands.target is None else operands.target
    missed = torch.ones(3001, 1, dtype=torch.float64)
    for first, last in zip(cut[::2], [*cut[1::2], 3001], strict=False):
        missed[first:last] = 0
    operands = replace(operands, **{"target" if target else "input": goal + missed * torch.randn_like(goal)})
    check_step(operands.map(lambda tensor: tensor.to(dtype)), reduction="sum")


# In float64, a tied bottleneck's encoder bias gradient is all that is left of numbers 1e5 times as large.
WITH_MEANS = [
    *((dtype, 1.0, tied) for dtype in DTYPES for tied in (False, True) if not (tied and dtype == torch.float64)),
    *((torch.float32, 0.1, tied) for tied in (False, True)),
]


@pytest.mark.parametrize("centred_data", [True, False], ids=["centred-data", "mean-data"])
@pytest.mark.parametrize(("dtype", "spread", "tied"), WITH_MEANS, ids=str)
@pytest.mark.parametrize("name", [name for name in ("native", "gram") if bf.backends()[name].available])
def test_codes_with_a_mean_cost_no_digits(
    name: str, dtype: torch.dtype, spread: float, tied: bool, centred_data: bool
) -> None:
    with bf.use_backend(name):
        step_with_code_means(dtype, tied, centred_data, spread)


# A residual that is noise leaves, of terms that grow with the number of rows, its root: what each row loses in the same
# way, and what sums lose that go on in float, would be seen. Eager PyTorch sums the residual itself.
@pytest.mark.skipif("native" not in BACKENDS, reason="there is no native core in this installation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "ratio"), [(8_209, 0.3), (50_021, 1.0), (200_003, 1.0), (200_003, 0.3)])
def test_many_rows_cost_no_digits(rows: int, ratio: float, dtype: torch.dtype) -> None:
    with bf.use_backend("native"):
        check_step(make_operands(rows, 64, 5, 64, dtype=dtype, target=True, ratio=ratio), reduction="sum")


# The last is long enough for several row tiles, threads and accumulators.
SHAPES = [(1, 1, 1), (1, 83, 13), (2, 5, 7), (13, 3, 1), (97, 31, 37), (5, 257, 3), (1009, 29, 2), (3001, 199, 41)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_contract_over_shapes(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], tied: bool) -> None:
    step_of_shape(shape, dtype, tied)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    in_features=st.integers(1, 70),
    rank=st.integers(1, 40),
    out_features=st.none() | st.integers(1, 70),
    tied=st.booleans(),
    bias=st.booleans(),
)
def test_contract_over_any_shape(
    rows: int, in_features: int, rank: int, out_features: int | None, tied: bool, bias: bool
) -> None:
    out_features = in_features if tied else out_features
    target = out_features not in (None, in_features)
    operands = make_operands(rows, in_features, rank, out_features, tied=tied, bias=bias, target=target)
    for name in BACKENDS:
        with bf.use_backend(name):
            check_step(operands)


def strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """A tensor of the same shape with unusual strides (for "expanded" rows: other values)."""
    if how == "row-sliced":
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), float("nan"), dtype=tensor.dtype)
        wide[:, 2:-3] = tensor
        return wide[:, 2:-3]
    if how == "every-other-row":
        tall = torch.full((2 * tensor.shape[0], tensor.shape[1]), float("nan"), dtype=tensor.dtype)
        tall[::2] = tensor
        return tall[::2]
    if how == "transposed":
        return tensor.t().contiguous().t()
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("how", ["row-sliced", "every-other-row", "transposed", "expanded"])
@pytest.mark.parametrize("name", ["input", "target", "encoder_weight", "decoder_weight"])
def test_contract_over_strides(backend: str, name: str, how: str) -> None:
    operands = make_operands(target=True, out_features=47)

    def with_strides(function):  # type: ignore[no-untyped-def]
        # results() clones its operands, so the strides are made inside the function.
        def call(*args: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
            given = dict(zip(Operands.NAMES, args, strict=False)) | options
            given[name] = strided(given[name], how)
            return function(**given)

        return call

    assert_all(with_strides(bf.bottleneck_mse_loss), with_strides(reference.bottleneck_mse_loss), operands)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    operands = make_operands(rows=max(1, torch.Size(leading).numel()), target=True, out_features=11)
    operands = replace(
        operands, input=operands.input.reshape(*leading, -1), target=operands.target.reshape(*leading, -1)
    )
    check_step(operands)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(backend: str, reduction: str) -> None:
    check_step(make_operands(target=True, out_features=11), reduction=reduction)


def test_no_rows_gives_what_eager_gives(backend: str) -> None:
    operands = make_operands(rows=0)
    ours, eager = (results(f, operands) for f in (bf.bottleneck_mse_loss, reference.bottleneck_mse_loss))
    for name in ours:
        torch.testing.assert_close(ours[name], eager[name], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_is_not_hidden(backend: str, activation: str, value: float) -> None:
    operands = make_operands()
    operands.input[3, 5] = value
    ours, eager = (
        results(f, operands, activation=activation) for f in (bf.bottleneck_mse_loss, reference.bottleneck_mse_loss)
    )
    for name in ours:
        hidden = ~eager[name].isfinite() & ours[name].isfinite()
        assert not hidden.any(), f"{name} is finite where eager's is not"


def test_bit_equal_over_runs(backend: str) -> None:
    same_bits(bf.bottleneck_mse_loss, make_operands(3001, 199, 41), times=6, activation="gelu")


def test_arguments_are_not_written(backend: str) -> None:
    operands = make_operands(target=True, out_features=11)
    before = operands.map(torch.clone)
    results(bf.bottleneck_mse_loss, operands)
    operands.map(lambda t: t.requires_grad_()).call(bf.bottleneck_mse_loss).backward()
    for name, tensor in operands.present().items():
        assert torch.equal(tensor, before.present()[name]), f"{name} was written"


def test_a_loss_is_never_negative(backend: str) -> None:
    # The reconstruction is exact, so that the Gram form's difference of sums is rounding alone.
    weight = torch.eye(7)
    for dtype in DTYPES:
        for tied in (False, True):
            x = torch.randn(50, 7).to(dtype)
            loss = bf.bottleneck_mse_loss(x, weight.to(dtype), None if tied else weight.to(dtype))
            assert loss.item() >= 0


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_thread_counts(backend: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_step(make_operands(501, 97, 11))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("native" not in BACKENDS, reason="there is no native core in this installation")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_setting_that_permits_less_precision_costs_none(precision: str) -> None:
    """The kernels keep, at any setting, the contract with what PyTorch computes at the highest precision."""
    operands = make_operands()
    eager = results(reference.bottleneck_mse_loss, operands)
    truth = results(reference.bottleneck_mse_loss, operands.map(torch.Tensor.double))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with bf.use_backend("native"):
            ours = results(bf.bottleneck_mse_loss, operands)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, out in ours.items():
        assert_contract(out, eager[name], truth[name], name)
