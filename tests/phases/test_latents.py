"""Fine-tuning on stored codes is fine-tuning the model: same gradients, same steps, nothing encoded or decoded."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from contract import assert_contract
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import byol_fast as bf

sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def model(digits: tuple[Tensor, Tensor], rest: list[nn.Module], bias: bool = True, **options: object) -> nn.Sequential:
    layer = bf.Bottleneck(64, 10, bias=bias, **options)
    bf.pretrain(layer, digits[0], epochs=2)
    return nn.Sequential(layer, *rest)


def tuned(digits: tuple[Tensor, Tensor], model: nn.Sequential, dtype: torch.dtype, cached: bool) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(dtype)
    inputs, part, freeze = digits[0].to(dtype), model, "bottlenecks"
    if cached:
        part, inputs = bf.cache_codes(model, inputs)
        freeze = "none"
    result = bf.finetune(part, (inputs, digits[1]), loss=cross_entropy, freeze=freeze, epochs=3, optimizer=sgd)
    return {"loss": torch.tensor(result.loss), **dict(model.named_parameters())}


# Made in the test, after the random numbers are seeded: with other weights in every run, one in many would have a unit
# of relu so near its kink that rounding decides on which side.
REST = {
    "hidden": lambda: [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)],
    "no-bias": lambda: [nn.Linear(64, 10, bias=False)],
    "linear": lambda: [nn.Linear(64, 10)],
    "relu": lambda: [nn.ReLU(), nn.Linear(64, 10)],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("activation", "tied", "rest"),
    [
        ("identity", False, "hidden"),
        ("identity", True, "no-bias"),
        ("relu", False, "linear"),
        ("tanh", False, "relu"),
    ],
)
def test_tuning_on_codes_is_tuning_the_model(digits, activation, tied, rest, bias):
    whole = model(digits, REST[rest](), bias, activation=activation, tied=tied)
    cached = tuned(digits, whole, torch.float32, cached=True)
    eager = tuned(digits, whole, torch.float32, cached=False)
    truth = tuned(digits, whole, torch.float64, cached=False)
    frozen = [name for name in truth if name.startswith("0.")]
    assert frozen
    for name, value in truth.items():
        if name in frozen:
            assert torch.equal(cached[name], whole.get_parameter(name)), name
        else:
            assert_contract(cached[name].detach(), eager[name].detach(), value.detach().double(), name)


def test_the_head_has_the_rest_of_the_parameters_and_no_decoder(digits):
    whole = model(digits, [nn.Linear(64, 10)]).eval()
    head, codes = bf.cache_codes(whole, digits[0])
    assert {id(parameter) for parameter in head.parameters()} == {id(whole[1].weight), id(whole[1].bias)}
    assert not head.training
    assert codes.shape == (len(digits[0]), 10)
    assert torch.equal(codes, whole[0].encode(digits[0]))


def test_a_sparse_matrix_and_a_numpy_array_have_codes(digits):
    whole = model(digits, [nn.Linear(64, 10)])
    codes = bf.cache_codes(whole, digits[0])[1]
    truth = whole.double()[0].encode(digits[0].double()).detach()
    whole.float()
    assert torch.equal(bf.cache_codes(whole, digits[0].numpy())[1], codes)
    assert_contract(bf.cache_codes(whole, digits[0].to_sparse_csr())[1], codes, truth, "codes of a sparse matrix")


def test_what_has_no_codes_is_told(digits):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Sequential that begins with a Bottleneck, got Linear"):
        bf.cache_codes(nn.Linear(64, 10), digits[0])
    with pytest.raises(TypeError, match="got one that begins with ReLU"):
        bf.cache_codes(nn.Sequential(nn.ReLU()), digits[0])
    with pytest.raises(ValueError, match="model: expected a Bottleneck without residual"):
        bf.cache_codes(nn.Sequential(bf.Bottleneck(64, 10, residual=True)), digits[0])
    with pytest.raises(TypeError, match="inputs: expected a tensor, an array"):
        bf.cache_codes(nn.Sequential(bf.Bottleneck(64, 10)), 3)
