"""torch.compile, torch.export, opcheck and autocast."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from contract import Operands, assert_contract, make_operands, results

import byol_fast as bf
from byol_fast import reference

pytestmark = pytest.mark.compiled


def both(operands: Operands) -> Callable[..., torch.Tensor]:
    def function(*args: torch.Tensor, **options: object) -> torch.Tensor:
        loss = bf.bottleneck_mse_loss(*args, activation="gelu", **options)
        output = bf.bottleneck(*args, activation="tanh", residual=True)
        return loss + bf.mse_loss(output, args[0] * 0.5)

    return function


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_compiled_equals_eager(backend: str, tied: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    operands = make_operands(23, 11, 5, tied=tied)
    function = both(operands)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (23, 31, 17):
        operands = make_operands(rows, 11, 5, tied=tied)
        ours, eager = results(compiled, operands), results(function, operands)
        for name in ours:
            torch.testing.assert_close(ours[name], eager[name], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler for CPUs needs g++")
def test_inductor(backend: str) -> None:
    torch._dynamo.reset()
    operands = make_operands(23, 11, 5)
    function = both(operands)
    ours, eager = results(torch.compile(function, fullgraph=True), operands), results(function, operands)
    for name in ours:
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-4, atol=1e-6)


def test_sparse_input_compiles(backend: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(9, 7) * (torch.rand(9, 7) < 0.4)
    weight = torch.randn(3, 7, requires_grad=True)
    rows = x.to_sparse_csr()
    loss = torch.compile(lambda w: bf.bottleneck_mse_loss(rows, w), backend="aot_eager")(weight)
    torch.testing.assert_close(loss, reference.bottleneck_mse_loss(x, weight))


needs_native = pytest.mark.skipif(
    not bf.backends()["native"].available, reason="the ops' kernels are the native core's, which is not installed"
)


def samples(requires_grad: bool = False) -> dict[str, list[tuple[object, ...]]]:
    """Arguments for each op of torch.ops.byol_fast."""
    o = make_operands(7, 5, 3, out_features=4, target=True)
    itself = make_operands(7, 5, 3)
    u = torch.randn(7, 3)
    scale = torch.tensor(0.3)
    csr = (torch.randn(7, 5) * (torch.rand(7, 5) < 0.4)).to_sparse_csr()
    rows = (csr.crow_indices().clone(), csr.col_indices().clone(), csr.values().clone())
    weights = (o.encoder_weight, o.decoder_weight, o.encoder_bias, o.decoder_bias)
    own = (itself.encoder_weight, itself.decoder_weight, itself.encoder_bias, itself.decoder_bias)
    tied = (o.encoder_weight, None, None, None)
    return {
        "squared_error": [(o.input, o.input + 1, "native")],
        "squared_error_backward": [
            (o.input, o.input + 1, scale, [True, True], "native"),
            (o.input, o.input + 1, scale, [False, True], "native"),
        ],
        "bottleneck": [
            (o.input, *weights, "tanh", False, True, "native"),
            (o.input, *tied, "relu", True, False, "native"),
        ],
        "bottleneck_backward": [
            (o.target, o.input, *weights, u, "tanh", False, [True] * 5, "native"),
            (o.input, o.input, *tied, u, "gelu", True, [True, True, False, False, True], "native"),
        ],
        "step": [
            (o.input, o.target, *weights, "silu", "mean", [True] * 4, True, "native"),
            (itself.input, None, *own, "identity", "sum", [True, False, True, False], False, "native"),
            (o.input, None, *tied, "identity", "mean", [True, False, False, False], False, "native"),
        ],
        "sparse_step": [
            (*rows, *own, "identity", "mean", [True] * 4, "native"),
            (*rows, *tied, "relu", "sum", [True] + [False] * 3, "native"),
        ],
        "step_input_gradients": [
            (o.input, o.target, *weights, u, u, scale, [True, True], "native"),
            (itself.input, None, *own, u, u, scale, [True, False], "native"),
        ],
    }


def test_samples_cover_every_op() -> None:
    schemas = torch._C._jit_get_all_schemas()
    names = {schema.name.partition("::")[2] for schema in schemas if schema.name.startswith("byol_fast::")}
    assert names == set(samples())


@needs_native
@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name: str) -> None:
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.byol_fast, name).default, arguments)


def test_export_runs_without_this_package(backend: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return bf.bottleneck(x, self.weight)

    layer, x = Layer(), torch.randn(4, 5)
    with bf.use_backend("auto"):
        program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    assert not [node for node in program.graph.nodes if "byol_fast" in str(node.target)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_autocast_casts_as_linear_does_and_reduces_in_float32(backend: str, tied: bool) -> None:
    operands = make_operands(tied=tied)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(bf.bottleneck_mse_loss, operands)
        eager = results(reference.bottleneck_mse_loss, operands)
        layer = operands.call(bf.bottleneck)
    assert layer.dtype == torch.bfloat16
    assert {name: out.dtype for name, out in ours.items()} == {name: out.dtype for name, out in eager.items()}
    if backend == "reference":
        assert all(torch.equal(ours[name], eager[name]) for name in ours)
        return
    rounded = operands.map(lambda t: t.bfloat16())
    eager, truth = (
        results(reference.bottleneck_mse_loss, rounded.map(cast)) for cast in (lambda t: t, torch.Tensor.double)
    )
    for name, out in ours.items():
        assert_contract(out.bfloat16(), eager[name], truth[name], name)


def test_autocast_leaves_float64_alone() -> None:
    operands = make_operands(dtype=torch.float64)
    with torch.autocast("cpu"):
        assert operands.call(bf.bottleneck).dtype == torch.float64
        assert operands.call(bf.bottleneck_mse_loss).dtype == torch.float64
