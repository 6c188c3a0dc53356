"""One line for each mistake: the argument, what was expected in symbols and numbers, and what came."""

from __future__ import annotations

import re

import pytest
import torch

import byol_fast as bf


def operands(**changes: object) -> dict[str, object]:
    given: dict[str, object] = {
        "input": torch.randn(6, 5),
        "encoder_weight": torch.randn(3, 5),
        "decoder_weight": torch.randn(4, 3),
        "encoder_bias": torch.randn(3),
        "decoder_bias": torch.randn(4),
        "target": torch.randn(6, 4),
    }
    return given | changes


CASES = [
    ({"input": None}, TypeError, "input: expected a torch.Tensor, got NoneType"),
    ({"encoder_weight": [1.0]}, TypeError, "encoder_weight: expected a torch.Tensor, got list"),
    ({"encoder_weight": None}, TypeError, "encoder_weight: expected a torch.Tensor, got NoneType"),
    (
        {"input": torch.ones(6, 5, dtype=torch.int64)},
        TypeError,
        "input: expected a floating-point tensor, got torch.int64",
    ),
    (
        {"encoder_weight": torch.ones(3, 5, dtype=torch.complex64)},
        TypeError,
        "encoder_weight: expected a floating-point tensor, got torch.complex64",
    ),
    (
        {"encoder_weight": torch.randn(3, 5).double()},
        TypeError,
        "encoder_weight: expected the dtype of input, torch.float32, got torch.float64",
    ),
    (
        {"target": torch.randn(6, 4).bfloat16()},
        TypeError,
        "target: expected the dtype of input, torch.float32, got torch.bfloat16",
    ),
    (
        {"decoder_weight": torch.randn(4, 3).to_sparse()},
        TypeError,
        "decoder_weight: expected a dense (strided) tensor, got layout torch.sparse_coo",
    ),
    (
        {"encoder_weight": torch.randn(3, 5).to_sparse_csr()},
        TypeError,
        "encoder_weight: expected a dense (strided) tensor, got layout torch.sparse_csr",
    ),
    (
        {"input": torch.randn(3, 2, 5).transpose(0, 1), "encoder_bias": torch.randn(3).double()},
        TypeError,
        "encoder_bias: expected the dtype of input, torch.float32, got torch.float64",
    ),
    (
        {"encoder_weight": torch.randn(3, 5, device="meta")},
        ValueError,
        "encoder_weight: expected a tensor on cpu, where input is, got one on meta",
    ),
    (
        {"encoder_weight": torch.randn(5)},
        ValueError,
        "encoder_weight: expected shape [rank, in_features] = [any, any], got [5]",
    ),
    (
        {"encoder_weight": torch.randn(0, 5)},
        ValueError,
        "encoder_weight: expected rank ≥ 1 and in_features ≥ 1, got shape [0, 5]",
    ),
    ({"input": torch.randn(6, 4)}, ValueError, "input: expected shape [..., in_features] = [..., 5], got [6, 4]"),
    ({"input": torch.tensor(1.0)}, ValueError, "input: expected shape [..., in_features] = [..., 5], got []"),
    (
        {"decoder_weight": torch.randn(4, 2)},
        ValueError,
        "decoder_weight: expected shape [out_features, rank] = [any, 3], got [4, 2]",
    ),
    ({"encoder_bias": torch.randn(4)}, ValueError, "encoder_bias: expected shape [rank] = [3], got [4]"),
    ({"encoder_bias": torch.randn(1, 3)}, ValueError, "encoder_bias: expected shape [rank] = [3], got [1, 3]"),
    ({"encoder_bias": torch.randn(1)}, ValueError, "encoder_bias: expected shape [rank] = [3], got [1]"),
    ({"decoder_bias": torch.randn(6, 4)}, ValueError, "decoder_bias: expected shape [out_features] = [4], got [6, 4]"),
    ({"decoder_bias": torch.randn(5)}, ValueError, "decoder_bias: expected shape [out_features] = [4], got [5]"),
    (
        {"target": torch.randn(6, 5)},
        ValueError,
        "target: expected shape [..., out_features] = [6, 4], got [6, 5]",
    ),
    (
        {"target": None},
        ValueError,
        "target: expected shape [..., out_features] = [6, 4], for out_features differs from in_features = 5, got None",
    ),
    (
        {"activation": "swish"},
        ValueError,
        "activation: expected one of identity, relu, gelu, gelu_tanh, silu, tanh, got 'swish'",
    ),
    ({"reduction": "avg"}, ValueError, "reduction: expected one of none, mean, sum, got 'avg'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES, ids=[case[2].partition(", got")[0] for case in CASES])
def test_bottleneck_mse_loss(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        bf.bottleneck_mse_loss(**operands(**changes))  # type: ignore[arg-type]
    if "reduction" not in changes:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            bf.explain(**operands(**changes))  # type: ignore[arg-type]


LAYER_CASES = [
    (
        {"residual": True},
        ValueError,
        "residual: expected out_features = in_features = 5 to add the input to the output, got out_features = 4",
    ),
    (
        {"residual": True, "decoder_weight": torch.randn(1, 3), "decoder_bias": torch.randn(1)},
        ValueError,
        "residual: expected out_features = in_features = 5 to add the input to the output, got out_features = 1",
    ),
    (
        {"input": torch.randn(6, 5).to_sparse_csr()},
        TypeError,
        "input: expected a dense (strided) tensor, got layout torch.sparse_csr",
    ),
    (
        {"decoder_bias": torch.randn(4).half()},
        TypeError,
        "decoder_bias: expected the dtype of input, torch.float32, got torch.float16",
    ),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize(("changes", "error", "message"), LAYER_CASES, ids=["residual", "broadcast", "sparse", "dtype"])
def test_bottleneck(changes: dict[str, object], error: type[Exception], message: str) -> None:
    given = operands(**changes)
    del given["target"]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        bf.bottleneck(**given)  # type: ignore[arg-type]


SPARSE_CASES = [
    ({}, "target: expected None, for a sparse input is its own target, got a tensor"),
    (
        {"target": None},
        "decoder_weight: expected out_features = in_features = 5, for a sparse input is its own target, got 4",
    ),
    (
        {"target": None, "decoder_weight": None, "decoder_bias": None, "reduction": "none"},
        "reduction: expected mean or sum for a sparse input, got 'none'",
    ),
    (
        {"target": None, "decoder_weight": None, "decoder_bias": None, "requires_grad": True},
        "input: expected a sparse input that requires no gradient, got requires_grad=True",
    ),
]


@pytest.mark.parametrize(("changes", "message"), SPARSE_CASES, ids=["target", "decoder", "reduction", "gradient"])
def test_sparse_input(changes: dict[str, object], message: str) -> None:
    given = operands(**changes)
    given["input"] = torch.randn(6, 5).to_sparse_coo().requires_grad_(bool(given.pop("requires_grad", False)))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bf.bottleneck_mse_loss(**given)  # type: ignore[arg-type]


def test_mse_loss() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"^target: expected a floating-point tensor, got torch\.int64$"):
        bf.mse_loss(x, x.long())
    with pytest.raises(TypeError, match=r"^target: expected a torch\.Tensor, got NoneType$"):
        bf.mse_loss(x, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^weight: expected the shape of input, \[3, 4\], got \[4\]$"):
        bf.mse_loss(x, x, weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"^reduction: expected one of none, mean, sum, got 'batchmean'$"):
        bf.mse_loss(x, x, reduction="batchmean")
    with pytest.raises(ValueError, match=r"^target: expected a tensor on cpu, where input is, got one on meta$"):
        bf.mse_loss(x, x.to("meta"))
    with pytest.raises(RuntimeError, match="must match"), pytest.warns(UserWarning, match="broadcast"):
        bf.mse_loss(x, torch.randn(5))
