"""mse_loss: a drop-in replacement of torch.nn.functional.mse_loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import DTYPES, assert_contract
from torch.testing._internal.common_methods_invocations import op_db

import byol_fast as bf

OPINFO = next(info for info in op_db if info.name == "nn.functional.mse_loss")


def outputs(function, input, target, **options):  # type: ignore[no-untyped-def]
    input, target = (t.detach().clone().requires_grad_() for t in (input, target))
    output = function(input, target, **options)
    cotangent = torch.ones_like(output)
    return output.detach(), *torch.autograd.grad(output, (input, target), cotangent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pytorchs_own_samples(backend: str, dtype: torch.dtype) -> None:
    samples = list(OPINFO.sample_inputs("cpu", dtype, requires_grad=False))
    assert len(samples) >= 3
    for sample in samples:
        ours = outputs(bf.mse_loss, sample.input, *sample.args, **sample.kwargs)
        theirs = outputs(F.mse_loss, sample.input, *sample.args, **sample.kwargs)
        truth = outputs(F.mse_loss, sample.input.double(), *(arg.double() for arg in sample.args), **sample.kwargs)
        for name, out, eager, true in zip(("output", "d_input", "d_target"), ours, theirs, truth, strict=True):
            assert_contract(out, eager, true, name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [1.0, 1e-3, 1e-6])
def test_contract(backend: str, dtype: torch.dtype, reduction: str, ratio: float) -> None:
    input = torch.randn(301, 97, dtype=torch.float64)
    target = (input + ratio**0.5 * torch.randn_like(input)).to(dtype)
    input = input.to(dtype)
    ours = outputs(bf.mse_loss, input, target, reduction=reduction)
    eager = outputs(F.mse_loss, input, target, reduction=reduction)
    truth = outputs(F.mse_loss, input.double(), target.double(), reduction=reduction)
    for name, out, same, true in zip(("output", "d_input", "d_target"), ours, eager, truth, strict=True):
        assert_contract(out, same, true, name)


LAYOUTS = {
    "scalar": lambda: torch.randn(()),
    "vector": lambda: torch.randn(7),
    "every other": lambda: torch.randn(14)[::2],
    "row-sliced": lambda: torch.randn(9, 8)[:, 1:6],
    "transposed": lambda: torch.randn(5, 9).t(),
    "expanded rows": lambda: torch.randn(1, 5).expand(9, 5),
    "expanded columns": lambda: torch.randn(9, 1).expand(9, 5),
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(2, 3, 4, 5).permute(3, 0, 2, 1),
    "long": lambda: torch.randn(100_003),
    "empty": lambda: torch.randn(0, 3),
}


@pytest.mark.filterwarnings("ignore:target has shape")
@pytest.mark.parametrize("second", ["same", "contiguous"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, second: str) -> None:
    input = LAYOUTS[layout]()
    target = LAYOUTS[layout]() if second == "same" else torch.randn(input.shape)
    for reduction in ("mean", "sum"):
        ours, theirs = [], []
        for function, results in ((bf.mse_loss, ours), (F.mse_loss, theirs)):
            x, t = input.detach().requires_grad_(), target.detach().requires_grad_()
            output = function(x, t, reduction=reduction)
            results += [output.detach(), *torch.autograd.grad(output, (x, t))]
        for out, eager in zip(ours, theirs, strict=True):
            torch.testing.assert_close(out, eager, equal_nan=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shapes", [((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (1, 4)), ((), (2, 2))], ids=str)
def test_broadcasting_works_and_warns(backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    input, target = (torch.randn(shape) for shape in shapes)
    with pytest.warns(UserWarning, match="they are broadcast"):
        ours = outputs(bf.mse_loss, input, target)
    with pytest.warns(UserWarning, match="broadcasting"):
        theirs = outputs(F.mse_loss, input, target)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weight(backend: str, reduction: str) -> None:
    input, target, weight = torch.randn(4, 5), torch.randn(4, 5), torch.rand(4, 5)
    ours = outputs(bf.mse_loss, input, target, reduction=reduction, weight=weight)
    torch.testing.assert_close(ours, outputs(F.mse_loss, input, target, reduction=reduction, weight=weight))


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_promote_as_eager_does(backend: str, dtype: torch.dtype, other: torch.dtype) -> None:
    input, target = torch.randn(4, 5).to(dtype), torch.randn(4, 5).to(other)
    ours, theirs = bf.mse_loss(input, target), F.mse_loss(input, target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)


def test_autocast_reduces_in_float32(backend: str) -> None:
    input, target = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    with torch.autocast("cpu"):
        ours, theirs = bf.mse_loss(input, target), F.mse_loss(input, target)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_same_tensor_twice_gives_no_gradient(backend: str) -> None:
    x = torch.randn(4, 5, requires_grad=True)
    bf.mse_loss(x, x).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
