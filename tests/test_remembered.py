"""A call like one before is not checked again; one that differs in anything that matters is."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from contract import make_operands

import byol_fast as bf
from byol_fast import functional, remembered


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(remembered, "_backends", {})


@pytest.fixture
def operands():
    return make_operands(512, 96, 8, target=True)


@pytest.fixture
def checked(monkeypatch):
    """What was checked, in order."""
    seen = []

    def watch(name):
        check = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *args: (seen.append(name), check(*args))[1])

    watch("_loss_backend")
    watch("_layer_backend")
    return seen


@pytest.mark.parametrize("function", [bf.bottleneck, bf.bottleneck_mse_loss])
def test_a_call_like_one_before_is_not_checked(operands, checked, function):
    operands = operands if function is bf.bottleneck_mse_loss else replace(operands, target=None)
    with bf.use_backend("gram"):
        first = operands.call(function)
        second = operands.map(torch.clone).call(function)
    assert torch.equal(first, second)
    assert len(checked) == 1


CHANGES = {
    "dtype": lambda operands: operands.map(torch.Tensor.double),
    "a gradient": lambda operands: replace(operands, encoder_bias=operands.encoder_bias.clone().requires_grad_()),
    "rows": lambda operands: replace(operands, input=operands.input[:300], target=operands.target[:300]),
    "a dimension more": lambda operands: replace(operands, input=operands.input[None], target=operands.target[None]),
    "no bias": lambda operands: replace(operands, decoder_bias=None),
    "no target": lambda operands: replace(operands, target=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_differ_are_checked(operands, checked, change):
    operands.call(bf.bottleneck_mse_loss)
    CHANGES[change](operands).call(bf.bottleneck_mse_loss)
    assert len(checked) == 2


@pytest.mark.parametrize(
    ("context", "options"),
    [
        (torch.no_grad, {}),
        (lambda: bf.use_backend("reference"), {}),
        (lambda: torch.autocast("cpu", torch.bfloat16), {}),
        (nullcontext, {"activation": "relu"}),
        (nullcontext, {"reduction": "sum"}),
    ],
    ids=["no_grad", "backend", "autocast", "activation", "reduction"],
)
def test_circumstances_that_differ_are_checked(operands, checked, context, options):
    operands.call(bf.bottleneck_mse_loss)
    with context():
        operands.call(bf.bottleneck_mse_loss, **options)
    assert len(checked) == 2


def test_a_mistake_after_a_good_call_is_found(operands):
    operands.call(bf.bottleneck_mse_loss)
    with pytest.raises(ValueError, match="encoder_bias"):
        replace(operands, encoder_bias=operands.decoder_bias).call(bf.bottleneck_mse_loss)
    with pytest.raises(TypeError, match="target"):
        replace(operands, target=operands.target.to_sparse()).call(bf.bottleneck_mse_loss)
    with pytest.raises(ValueError, match="reduction"):
        operands.call(bf.bottleneck_mse_loss, reduction="median")


@pytest.mark.parametrize("option", ["activation", "reduction"])
def test_an_option_without_a_hash_is_a_mistake_like_any_other(operands, option):
    with pytest.raises(ValueError, match=option):
        operands.call(bf.bottleneck_mse_loss, **{option: ["mean"]})


def test_a_mistake_is_found_again(operands):
    wrong = replace(operands, encoder_bias=operands.decoder_bias)
    for _ in range(2):
        with pytest.raises(ValueError, match="encoder_bias"):
            wrong.call(bf.bottleneck_mse_loss)


def test_a_subclass_goes_to_pytorch_after_a_plain_tensor(operands):
    class Logged(torch.Tensor):
        pass

    operands.call(bf.bottleneck_mse_loss)
    loss = replace(operands, input=operands.input.as_subclass(Logged)).call(bf.bottleneck_mse_loss)
    assert type(loss) is Logged


def test_a_transform_sees_pytorchs_operations_after_a_plain_call(operands):
    def loss(input):
        return replace(operands, input=input).call(bf.bottleneck_mse_loss)

    def tangent():
        return torch.func.jvp(loss, (operands.input,), (operands.input,))[1]

    loss(operands.input)
    found = tangent()
    with bf.use_backend("reference"):
        torch.testing.assert_close(found, tangent(), rtol=0, atol=0)


def test_what_is_remembered_is_bounded(operands, monkeypatch):
    monkeypatch.setattr(remembered, "_MOST", 3)
    for rows in range(300, 310):
        replace(operands, input=operands.input[:rows], target=operands.target[:rows]).call(bf.bottleneck_mse_loss)
        assert len(remembered._backends) <= 3
