"""Sparse input: the same loss and gradients as the dense rows would give, by the accuracy contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from contract import ACTIVATIONS, DTYPES, RATIOS, assert_all, make_operands, results

import byol_fast as bf
from byol_fast import reference

SPARSE = {"csr": torch.Tensor.to_sparse_csr, "coo": torch.Tensor.to_sparse_coo}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
WEIGHTS = ("encoder_weight", "decoder_weight", "encoder_bias", "decoder_bias")


def of_sparse(layout: str = "csr") -> Callable[..., torch.Tensor]:
    def function(input: torch.Tensor, *weights: torch.Tensor, **options: object) -> torch.Tensor:
        return bf.bottleneck_mse_loss(SPARSE[layout](input), *weights, **options)

    return function


def thinned(operands, keep: float = 0.2):  # type: ignore[no-untyped-def]
    return replace(operands, input=operands.input * (torch.rand(operands.input.shape) < keep))


def check(operands, layout: str = "csr", **options: object) -> None:  # type: ignore[no-untyped-def]
    assert_all(of_sparse(layout), reference.bottleneck_mse_loss, operands, needs=WEIGHTS, **options)


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(backend: str, dtype: torch.dtype, tied: bool, bias: bool, layout: str) -> None:
    check(thinned(make_operands(dtype=dtype, tied=tied, bias=bias)), layout)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_contract_over_activations(backend: str, activation: str, tied: bool) -> None:
    check(thinned(make_operands(tied=tied)), activation=activation, reduction="sum")


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_contract_over_residual_ratios(backend: str, dtype: torch.dtype, ratio: float) -> None:
    # All entries are stored: thinning would spoil the ratio.
    check(make_operands(dtype=dtype, ratio=ratio))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 300, 70), (300, 2, 3), (601, 97, 64)], ids=str)
def test_contract_over_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    check(thinned(make_operands(*shape), 0.5))


def test_empty_rows_and_columns(backend: str) -> None:
    operands = thinned(make_operands(61, 31, 5))
    operands.input[10:40] = 0
    operands.input[:, 7:19] = 0
    check(operands)


def test_nothing_stored(backend: str) -> None:
    operands = make_operands(11, 7, 3)
    check(replace(operands, input=torch.zeros_like(operands.input)))


def test_duplicates_in_coo_are_summed(backend: str) -> None:
    indices = torch.tensor([[0, 0, 1], [2, 2, 0]])
    x = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, 3.0]), (2, 4))
    weight = torch.randn(2, 4)
    torch.testing.assert_close(bf.bottleneck_mse_loss(x, weight), bf.bottleneck_mse_loss(x.to_dense(), weight))


def test_a_popular_column_is_summed_exactly_enough(backend: str) -> None:
    operands = make_operands(9001, 17, 3)
    operands.input[:, 1:] = 0
    check(operands)


def test_bit_equal_over_runs(backend: str) -> None:
    operands = thinned(make_operands(2003, 97, 17))
    first = results(of_sparse(), operands, WEIGHTS)
    for _ in range(5):
        again = results(of_sparse(), operands, WEIGHTS)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_double_backward(backend: str) -> None:
    x = torch.randn(9, 7, dtype=torch.float64) * (torch.rand(9, 7) < 0.4)
    weight = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def second(function: Callable[..., torch.Tensor], input: torch.Tensor) -> torch.Tensor:
        (first,) = torch.autograd.grad(function(input, weight), weight, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), weight)[0]

    ours = second(bf.bottleneck_mse_loss, x.to_sparse_csr())
    torch.testing.assert_close(ours, second(reference.bottleneck_mse_loss, x))


def test_autocast(backend: str) -> None:
    x, weight = torch.randn(9, 7), torch.randn(3, 7)
    with torch.autocast("cpu"):
        loss = bf.bottleneck_mse_loss(x.to_sparse_csr(), weight)
        dense = bf.bottleneck_mse_loss(x, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dense, rtol=2e-2, atol=0)


def test_explain(backend: str) -> None:
    x = torch.randn(9, 7).to_sparse_csr()
    form = bf.explain(x, torch.randn(3, 7)).form
    assert form.startswith(
        "direct, the input made dense" if backend == "reference" else "sparse gram (tied: one product)"
    )
