"""The Gram identity in PyTorch's own products: the accuracy contract, on the device that is here.

Not among the backends of every test: ``auto`` never runs it on a CPU, and its layer is what eager does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from contract import ACTIVATIONS, DTYPES, make_operands, results
from sweeps import check_layer, check_step, step_at_ratio, step_of_shape

import byol_fast as bf
from byol_fast.backends import Call, gram


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with bf.use_backend("gram"):
        yield


@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_step_over_residual_ratios(dtype: torch.dtype, tied: bool, ratio: float) -> None:
    step_at_ratio(dtype, tied, ratio)


@pytest.mark.parametrize("ratio", [1.0, 1e-4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_step_with_a_target(activation: str, ratio: float) -> None:
    operands = make_operands(out_features=47, target=True, activation=activation, ratio=ratio)
    check_step(operands, activation=activation)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 83, 13), (97, 31, 37), (1009, 29, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_over_shapes(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    step_of_shape(shape, dtype)


def test_blocks_of_columns_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_BLOCK", 1)
    check_step(make_operands(ratio=1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer(activation: str, dtype: torch.dtype) -> None:
    for tied in (False, True):
        check_layer(make_operands(dtype=dtype, tied=tied), activation=activation, residual=True)


def test_squared_error() -> None:
    x, t = torch.randn(9, 7, requires_grad=True), torch.randn(9, 7)
    bf.mse_loss(x, t).backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() - t) / 63)


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_sparse_input() -> None:
    operands = make_operands(rows=40)
    dense = results(bf.bottleneck_mse_loss, operands, ("encoder_weight", "decoder_weight"))
    leaves = replace(operands, input=operands.input.to_sparse_csr())
    weights = [leaves.encoder_weight.requires_grad_(), leaves.decoder_weight.requires_grad_()]
    loss = leaves.call(bf.bottleneck_mse_loss)
    for name, gradient in zip(("encoder", "decoder"), torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(gradient, dense[f"d_{name}_weight"], rtol=1e-4, atol=1e-6)


def test_form_where_float32_has_to_be_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("bottleneck_mse_loss", torch.float32, 64, 300, 300, 8)
    gpu = torch.device("cuda")

    def form(call: Call, device: torch.device, capturing: bool = False) -> str:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        return gram.Gram().form(call, False, device)

    assert form(call, gpu).startswith("gram, direct for a residual ratio")
    assert form(call, gpu, capturing=True).startswith("direct, for")
    assert form(call._replace(dtype=torch.bfloat16), gpu, capturing=True) == "gram"
    torch.set_float32_matmul_precision("high")
    try:
        assert form(call, gpu).startswith("direct, for")
        assert form(call, torch.device("cpu")).startswith("gram, direct")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_form_and_refusal() -> None:
    operands = make_operands(5, 4, 2, tied=True)
    assert "gram (tied: one product), direct" in operands.call(bf.explain).form  # type: ignore[attr-defined]
    with pytest.raises(bf.BackendError, match="computes values, which tensors on meta have none of"):
        operands.map(lambda tensor: tensor.to("meta")).call(bf.bottleneck_mse_loss)
