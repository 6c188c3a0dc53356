"""Derivatives: gradcheck to second order, subsets of gradients, torch.func, and what the forward pass keeps."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from contract import ACTIVATIONS, Operands, make_operands, results
from torch.autograd import gradcheck, gradgradcheck

import byol_fast as bf
from byol_fast import reference

# relu has no derivative at zero, and its second derivative is none; finite differences agree away from it.
SMOOTH = [name for name in ACTIVATIONS if name != "relu"]


def double_operands(tied: bool, target: bool, bias: bool = True) -> Operands:
    operands = make_operands(
        4, 3, 2, 3 if tied or not target else 5, dtype=torch.float64, tied=tied, target=target, bias=bias
    )
    return operands.map(lambda t: t.requires_grad_())


@pytest.mark.parametrize("target", [False, True], ids=["itself", "target"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_loss(backend: str, activation: str, tied: bool, target: bool) -> None:
    operands = double_operands(tied, target)
    names = list(operands.present())

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return replace(operands, **dict(zip(names, tensors, strict=True))).call(
            bf.bottleneck_mse_loss, activation=activation
        )

    tensors = tuple(operands.present().values())
    assert gradcheck(loss, tensors)
    if activation in SMOOTH:
        assert gradgradcheck(loss, tensors)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_layer(backend: str, activation: str, tied: bool, residual: bool) -> None:
    operands = double_operands(tied, False)
    names = list(operands.present())

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return replace(operands, **dict(zip(names, tensors, strict=True))).call(
            bf.bottleneck, activation=activation, residual=residual
        )

    tensors = tuple(operands.present().values())
    assert gradcheck(layer, tensors)
    if activation in SMOOTH:
        assert gradgradcheck(layer, tensors)


def test_gradcheck_of_the_squared_error(backend: str) -> None:
    input, target = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for reduction in ("mean", "sum"):
        assert gradcheck(lambda x, t, r=reduction: bf.mse_loss(x, t, r), (input, target))
        assert gradgradcheck(lambda x, t, r=reduction: bf.mse_loss(x, t, r), (input, target))


def test_third_derivative(backend: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def third(function):  # type: ignore[no-untyped-def]
        value = function(x, weight, activation="tanh")
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
            value = gradient.pow(2).sum()
        return gradient

    torch.testing.assert_close(third(bf.bottleneck_mse_loss), third(reference.bottleneck_mse_loss))


def test_a_penalty_on_the_gradient_is_not_dropped(backend: str) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(2, 4, requires_grad=True)
    gradients = []
    for function in (bf.bottleneck_mse_loss, reference.bottleneck_mse_loss):
        loss = function(x, weight)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        gradients.append(torch.autograd.grad(loss + slope.pow(2).sum(), weight)[0])
    torch.testing.assert_close(*gradients)


SUBSETS = [names for size in range(1, 7) for names in combinations(Operands.NAMES, size)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_subset_of_gradients(backend: str, tied: bool) -> None:
    for activation in ("identity", "gelu"):
        operands = make_operands(19, 11, 5, tied=tied, target=True, dtype=torch.float64)
        everything = results(bf.bottleneck_mse_loss, operands, activation=activation)
        layer = replace(operands, target=None)
        everything_of_layer = results(bf.bottleneck, layer, activation=activation)
        for names in SUBSETS:
            if set(names) <= set(operands.present()):
                for name, gradient in results(bf.bottleneck_mse_loss, operands, names, activation=activation).items():
                    torch.testing.assert_close(gradient, everything[name], rtol=1e-12, atol=1e-14)
            if set(names) <= set(layer.present()):
                for name, gradient in results(bf.bottleneck, layer, names, activation=activation).items():
                    torch.testing.assert_close(gradient, everything_of_layer[name], rtol=1e-12, atol=1e-14)


def test_subsets_when_the_input_is_its_own_target(backend: str) -> None:
    operands = make_operands(19, 11, 5, dtype=torch.float64)
    everything = results(bf.bottleneck_mse_loss, operands)
    for names in SUBSETS:
        if set(names) <= set(operands.present()):
            for name, gradient in results(bf.bottleneck_mse_loss, operands, names).items():
                torch.testing.assert_close(gradient, everything[name], rtol=1e-12, atol=1e-14)


def test_input_given_as_target_too(backend: str) -> None:
    operands = make_operands(19, 11, 5, dtype=torch.float64)
    gradients = []
    for explicit in (False, True):
        x = operands.input.clone().requires_grad_()
        target = x if explicit else None
        loss = bf.bottleneck_mse_loss(x, operands.encoder_weight, operands.decoder_weight, target=target)
        gradients.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*gradients)


def saved_numbers(needs: tuple[str, ...], operands: Operands) -> int:
    """How many numbers the forward pass keeps that are not its arguments."""
    leaves = operands.map(torch.clone)
    for name in needs:
        getattr(leaves, name).requires_grad_()
    arguments = {tensor.data_ptr() for tensor in leaves.present().values()}
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() if tensor.data_ptr() not in arguments else 0
        return tensor

    with bf.use_backend("native"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        leaves.call(bf.bottleneck_mse_loss)
    return kept


@pytest.mark.skipif(not bf.backends()["native"].available, reason="there is no native core in this installation")
def test_native_forward_keeps_what_the_needed_gradients_want() -> None:
    operands = make_operands(301, 83, 7)
    rows, (rank, features) = 301, (7, 83)
    slack = 4  # scalars
    assert saved_numbers((), operands) == 0
    assert saved_numbers(("decoder_bias",), operands) <= features + slack
    assert saved_numbers(("encoder_weight",), operands) <= rank * features + slack
    both = ("encoder_weight", "decoder_weight", "encoder_bias", "decoder_bias")
    assert saved_numbers(both, operands) <= 2 * rank * features + rank + features + slack
    assert saved_numbers(("input",), operands) <= 2 * rows * rank + slack


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_kept_graph_gives_its_gradients_again(backend: str, tied: bool) -> None:
    """Gradients are multiplied in place, but not where another backward pass may ask for them."""
    operands = double_operands(tied, False)
    tensors = tuple(operands.present().values())
    loss = operands.call(bf.bottleneck_mse_loss)
    first = torch.autograd.grad(3 * loss, tensors, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    for second, expected in zip(torch.autograd.grad(3 * loss, tensors), kept, strict=True):
        assert torch.equal(second, expected)


def test_gradients_accumulate(backend: str) -> None:
    operands = double_operands(False, False)
    for factor in (1.0, 2.0):
        (factor * operands.call(bf.bottleneck_mse_loss)).backward()
    once = torch.autograd.grad(operands.call(bf.bottleneck_mse_loss), tuple(operands.present().values()))
    for tensor, gradient in zip(operands.present().values(), once, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * gradient)


def test_torch_func(backend: str) -> None:
    operands = make_operands(8, 5, 3, dtype=torch.float64)
    x, decoder = operands.input, operands.decoder_weight

    def ours(weight: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
        return bf.bottleneck_mse_loss(x, weight, decoder, activation="tanh")

    def theirs(weight: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
        return reference.bottleneck_mse_loss(x, weight, decoder, activation="tanh")

    weight = operands.encoder_weight
    for function in (
        lambda f: torch.func.grad(f)(weight),
        lambda f: torch.vmap(f, (None, 0))(weight, x[:, None]),
        lambda f: torch.vmap(torch.func.grad(f), (None, 0))(weight, x[:, None]),
        lambda f: torch.func.grad(lambda w: torch.func.grad(f)(w).pow(2).sum())(weight),
    ):
        torch.testing.assert_close(function(ours), function(theirs))


def test_forward_mode_is_right_or_refused(backend: str) -> None:
    operands = make_operands(8, 5, 3, dtype=torch.float64)
    weight, tangent = operands.encoder_weight, torch.ones_like(operands.encoder_weight)

    def jvp(function):  # type: ignore[no-untyped-def]
        return torch.func.jvp(lambda w: function(operands.input, w, operands.decoder_weight), (weight,), (tangent,))

    if backend == "reference":
        torch.testing.assert_close(jvp(bf.bottleneck_mse_loss), jvp(reference.bottleneck_mse_loss))
    else:
        with pytest.raises(bf.BackendError, match="forward-mode differentiation only runs in plain PyTorch"):
            jvp(bf.bottleneck_mse_loss)


def test_auto_runs_every_transform() -> None:
    operands = make_operands(8, 5, 3, dtype=torch.float64)
    weight, tangent = operands.encoder_weight, torch.ones_like(operands.encoder_weight)
    for transform in (
        lambda f: torch.func.jvp(f, (weight,), (tangent,)),
        lambda f: torch.func.hessian(f)(weight),
        lambda f: torch.func.jacrev(torch.func.jacrev(f))(weight),
    ):
        ours, theirs = (
            transform(lambda w, f=f: f(operands.input, w, operands.decoder_weight))
            for f in (bf.bottleneck_mse_loss, reference.bottleneck_mse_loss)
        )
        torch.testing.assert_close(ours, theirs)
