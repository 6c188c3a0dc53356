"""The CUDA kernels' own source, emulated: tiles, masks, fragments, order of sums, judged by the accuracy contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from contract import ACTIVATIONS, Operands, assert_all, make_operands, results
from sweeps import (
    check_layer,
    check_step,
    step_at_ratio,
    step_of_shape,
    step_with_a_target_at_ratio,
    step_with_activation,
)

import byol_fast as bf
from byol_fast import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Float takes the direct form below 4e-3.
RATIOS = [1.0, 1e-2, 1e-4, 1e-6]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_step_over_residual_ratios(cuda: str, dtype: torch.dtype, tied: bool, ratio: float) -> None:
    step_at_ratio(dtype, tied, ratio)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_with_a_target(cuda: str, dtype: torch.dtype, ratio: float) -> None:
    step_with_a_target_at_ratio(dtype, ratio)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tied_step_with_a_target(cuda: str, dtype: torch.dtype) -> None:
    check_step(make_operands(rows=140, dtype=dtype, tied=True, target=True, ratio=1e-1), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_step_over_activations(cuda: str, activation: str, dtype: torch.dtype) -> None:
    step_with_activation(activation, dtype, rows=70)


# On both sides of every tile of codes (16, 32, 64, 128), of rows (64, 128) and of columns (32, 64, 128).
SHAPES = [
    (1, 1, 1),
    (1, 83, 13),
    (5, 257, 3),
    (64, 64, 16),
    (65, 63, 17),
    (127, 33, 32),
    (129, 129, 33),
    (128, 128, 64),
    (200, 100, 65),
    (63, 150, 128),
    (700, 24, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_over_shapes(cuda: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    step_of_shape(shape, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layer_over_shapes(cuda: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    # A residual in every other shape.
    check_layer(make_operands(*shape, dtype=dtype), activation="silu", residual=shape[1] % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_layer(cuda: str, dtype: torch.dtype, tied: bool) -> None:
    check_layer(
        make_operands(tied=tied, dtype=dtype, out_features=None if tied else 47, target=not tied), activation="gelu"
    )


def test_float_tiles_choose_their_form_one_by_one(cuda: str) -> None:
    # The first row tile is reproduced nearly exactly, the second not at all.
    near, far = make_operands(rows=128, ratio=1e-5), make_operands(rows=128, ratio=1.0)
    check_step(replace(near, input=torch.cat([near.input, far.input])), reduction="sum")


@pytest.mark.parametrize("offset", [0, 1])
def test_rows_that_begin_anywhere(cuda: str, offset: int) -> None:
    """Strides that no 16-byte copy can start at, and NaN around what belongs to the matrix."""
    operands = make_operands(rows=70, in_features=64, rank=9, dtype=torch.bfloat16)

    def within_nan(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 16), float("nan"), dtype=tensor.dtype)
        view = wide[1:-1, 8 + offset : 8 + offset + tensor.shape[1]]
        view.copy_(tensor)
        return view

    def call(input: torch.Tensor, encoder: torch.Tensor, decoder: torch.Tensor, *biases: torch.Tensor) -> torch.Tensor:
        return bf.bottleneck_mse_loss(within_nan(input), within_nan(encoder), within_nan(decoder), *biases)

    strided = results(call, operands)
    plain = results(bf.bottleneck_mse_loss, operands)
    assert all(torch.equal(strided[name], plain[name]) for name in plain)


@pytest.mark.parametrize("needs", ["encoder_weight", "decoder_weight", "decoder_bias", "input", "encoder_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_gradient_alone_is_the_same(cuda: str, dtype: torch.dtype, needs: str) -> None:
    operands = make_operands(rows=130, dtype=dtype, target=True, out_features=47, ratio=1e-1)
    for function in (bf.bottleneck_mse_loss, bf.bottleneck):
        used = operands if function is bf.bottleneck_mse_loss else replace(operands, target=None)
        alone, everything = results(function, used, [needs]), results(function, used)
        assert all(torch.equal(alone[name], everything[name]) for name in alone)


def test_loss_without_gradients(cuda: str) -> None:
    operands = make_operands(rows=300)
    with torch.no_grad():
        loss = operands.call(bf.bottleneck_mse_loss)
    assert torch.equal(loss, results(bf.bottleneck_mse_loss, operands)["output"])


def summed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda input, target, *_: function(input, target, reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_error(cuda: str, dtype: torch.dtype) -> None:
    x = torch.randn(37, 45, dtype=torch.float64)
    pairs = [(x, torch.randn(37, 45)), (x.t(), torch.randn(45, 37)), (x[:, 3:20], torch.randn(37, 17)), (x[0], x[1])]
    for input, target in pairs:
        operands = Operands(input.to(dtype), target.to(dtype))
        assert_all(summed(bf.mse_loss), summed(reference.mse_loss), operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["input", "encoder_weight", "decoder_weight", "encoder_bias", "decoder_bias"])
def test_nan_in_nan_out(cuda: str, dtype: torch.dtype, name: str) -> None:
    operands = make_operands(rows=70, dtype=dtype)
    getattr(operands, name)[..., 0] = float("nan")
    assert operands.call(bf.bottleneck_mse_loss).isnan()
    assert operands.call(bf.bottleneck).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [29, 100])
def test_no_result_depends_on_the_order_of_threads(
    cuda: str, dtype: torch.dtype, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two barriers the emulator runs threads in either order; a race would show as another result."""
    operands = make_operands(rows=300, in_features=140, rank=rank, dtype=dtype, ratio=1e-2)
    forward = results(bf.bottleneck_mse_loss, operands), results(bf.bottleneck, operands)
    monkeypatch.setenv("EMULATOR_ORDER", "backward")
    backward = results(bf.bottleneck_mse_loss, operands), results(bf.bottleneck, operands)
    for one, other in zip(forward, backward, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_rank_above_the_widest_tile(cuda: str) -> None:
    operands = make_operands(rows=3, in_features=200, rank=129)
    with pytest.raises(ValueError, match=r"^backend 'cuda': expected a rank ≤ 128, got 129$"):
        operands.call(bf.bottleneck_mse_loss)
    with pytest.raises(ValueError, match=r"^backend 'cuda': expected a rank ≤ 128, got 129$"):
        operands.call(bf.explain)  # type: ignore[arg-type]


def test_float64_has_no_kernels(cuda: str) -> None:
    operands = make_operands(rows=3, dtype=torch.float64)
    with pytest.raises(bf.BackendError, match=r"it has no kernels for torch\.float64"):
        operands.call(bf.bottleneck_mse_loss)


def test_form_tells_of_the_direct_form(cuda: str) -> None:
    # A few rows of bfloat16 are computed as float32.
    for rows, dtype, direct in ((40, torch.float32, True), (40, torch.bfloat16, False), (4, torch.bfloat16, True)):
        form = make_operands(rows, dtype=dtype).call(bf.explain).form  # type: ignore[arg-type, attr-defined]
        assert ("direct for row tiles" in form) == direct
