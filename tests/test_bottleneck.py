"""bottleneck: the accuracy contract over dtypes, activations, shapes and strides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import ACTIVATIONS, DTYPES, make_operands, relative_error, results
from sweeps import check_layer, same_bits
from torch import Tensor

import byol_fast as bf
from byol_fast import reference


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_contract(backend: str, activation: str, dtype: torch.dtype, tied: bool, residual: bool) -> None:
    operands = make_operands(dtype=dtype, tied=tied)
    check_layer(operands, activation=activation, residual=residual)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 64, 8, 3), (7, 5, 9, 11), (64, 97, 1, 31), (2003, 41, 17, 389)])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_contract_over_shapes(backend: str, shape: tuple[int, int, int, int], bias: bool) -> None:
    operands = make_operands(*shape, bias=bias, target=True)
    check_layer(operands, activation="gelu")


@pytest.mark.skipif(not bf.backends()["native"].available, reason="there is no native core in this installation")
@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_float32_keeps_all_of_its_digits(exponent: int) -> None:
    """The contract has a floor that products of 16 digits pass, made of two bfloat16 each; here is none."""
    operands = make_operands(300, 500, 70, bias=False)
    operands = replace(operands, input=operands.input * 2.0**exponent)
    truth = operands.map(Tensor.double).call(reference.bottleneck)
    eager = operands.call(reference.bottleneck)
    with bf.use_backend("native"):
        ours = operands.call(bf.bottleneck)
    assert relative_error(ours, truth) <= 2 * relative_error(eager, truth)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    operands = make_operands(rows=torch.Size(leading).numel())
    operands = replace(operands, input=operands.input.reshape(*leading, operands.input.shape[-1]))
    check_layer(operands)


def test_input_that_cannot_be_viewed_as_a_matrix(backend: str) -> None:
    operands = make_operands(rows=6, in_features=5, rank=3)
    x = operands.input.reshape(2, 3, 5).transpose(0, 1)
    expected = reference.bottleneck(x, operands.encoder_weight, operands.decoder_weight)
    torch.testing.assert_close(bf.bottleneck(x, operands.encoder_weight, operands.decoder_weight), expected)


@pytest.mark.parametrize("gradient", ["expanded", "column-sliced", "transposed"])
def test_strides_of_the_incoming_gradient(backend: str, gradient: str) -> None:
    operands = make_operands(out_features=7, target=True)
    shape = (operands.input.shape[0], 7)
    cotangent = {
        "expanded": torch.tensor(0.3).expand(shape),
        "column-sliced": torch.randn(shape[0], 11)[:, 2:9],
        "transposed": torch.randn(7, shape[0]).t(),
    }[gradient]
    gradients = []
    for function in (bf.bottleneck, reference.bottleneck):
        leaves = replace(operands, target=None).map(lambda t: t.clone().requires_grad_())
        leaves.call(function).backward(cotangent)
        gradients.append([leaf.grad for leaf in leaves.present().values()])
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_bit_equal_over_runs(backend: str) -> None:
    same_bits(bf.bottleneck, make_operands(2003, 97, 17), times=6, activation="silu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_is_not_hidden(backend: str, activation: str, value: float) -> None:
    operands = make_operands(rows=5)
    operands.input[3, 5] = value
    ours, eager = (results(f, operands, activation=activation) for f in (bf.bottleneck, reference.bottleneck))
    for name in ours:
        hidden = ~eager[name].isfinite() & ours[name].isfinite()
        assert not hidden.any(), f"{name} is finite where eager's is not"
    assert ours["output"][[0, 1, 2, 4]].isfinite().all(), "a row spoils the others"
