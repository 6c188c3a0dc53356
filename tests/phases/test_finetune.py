"""finetune on scikit-learn's digits: the task is learnt, the bottleneck stays as it is, and a breach is noticed."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import byol_fast as bf

adam = functools.partial(torch.optim.Adam, lr=1e-2)


@pytest.fixture
def model(digits):
    layer = bf.Bottleneck(64, 10)
    bf.pretrain(layer, digits[0])
    return nn.Sequential(layer, nn.Linear(64, 10))


def bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_model_learns_and_its_bottleneck_stays_bit_identical(digits, model):
    rows, labels = digits
    before = bits(model)
    result = bf.finetune(model, (rows[:1400], labels[:1400]), loss=cross_entropy, epochs=40, optimizer=adam)
    assert float((model(rows[1400:]).argmax(1) == labels[1400:]).float().mean()) > 0.85
    assert result.model is model
    assert result.loss < result.history[0]["loss"]
    assert result.frozen == ("0.encoder.weight", "0.encoder.bias", "0.decoder.weight", "0.decoder.bias")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in result.frozen)
    assert not torch.equal(before["1.weight"], after["1.weight"])


def test_flags_and_modes_are_restored(digits, model):
    model[0].decoder.bias.requires_grad_(False)
    model.eval()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    bf.finetune(model, digits, loss=cross_entropy, epochs=1)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module.training for module in model.modules())


def test_layers_below_a_frozen_bottleneck_still_learn(digits):
    model = nn.Sequential(nn.Linear(64, 64), bf.Bottleneck(64, 10), nn.Linear(64, 10))
    before = bits(model)
    bf.finetune(model, digits, loss=cross_entropy, epochs=1)
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert torch.equal(before["1.encoder.weight"], model[1].encoder.weight)


@pytest.mark.parametrize(("freeze", "frozen"), [("none", ()), (["1"], ("1.weight", "1.bias"))])
def test_freeze_chooses_what_is_frozen(digits, model, freeze, frozen):
    result = bf.finetune(model, digits, loss=cross_entropy, freeze=freeze, epochs=1)
    assert result.frozen == frozen
    with pytest.raises(ValueError, match=r'freeze: expected "bottlenecks", "none" or names of submodules .* got .head'):
        bf.finetune(model, digits, loss=cross_entropy, freeze="head", epochs=1)


# ------------------------------------------------------------------------------------- breaches are noticed


def test_a_frozen_parameter_in_the_optimizer_is_an_error(digits, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"to be in no optimiser, found 0.encoder.weight, .* in one"):
        bf.finetune(model, digits, loss=cross_entropy, optimizer=optimizer, epochs=1)


def test_a_gradient_of_a_frozen_parameter_is_an_error(digits, model):
    def thawing_loss(output, target):
        # What a careless model does: ask for a gradient behind our back.
        weight = model[0].decoder.weight.requires_grad_(True)
        return cross_entropy(output, target) + weight.square().sum()

    with pytest.raises(RuntimeError, match=r"to get no gradient, found one of 0.decoder.weight"):
        bf.finetune(model, digits, loss=thawing_loss, epochs=1)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_change_of_a_frozen_parameter_is_an_error(digits, model):
    def meddling_loss(output, target):
        with torch.no_grad():
            # One unit in the last place.
            bias = model[0].decoder.bias
            bias.copy_(torch.nextafter(bias, torch.full_like(bias, 9.0)))
        return cross_entropy(output, target)

    with pytest.raises(RuntimeError, match=r"to keep their bits, found 0.decoder.bias changed"):
        bf.finetune(model, digits, loss=meddling_loss, epochs=1)


def test_minus_zero_is_not_zero(digits, model):
    model[0].decoder.bias.data.zero_()

    def meddling_loss(output, target):
        with torch.no_grad():
            model[0].decoder.bias.neg_()
        return cross_entropy(output, target)

    with pytest.raises(RuntimeError, match=r"found 0.decoder.bias changed"):
        bf.finetune(model, digits, loss=meddling_loss, epochs=1, batch_size=None)


@pytest.mark.parametrize(
    ("model", "loss", "error", "message"),
    [
        ("model", cross_entropy, TypeError, "model: expected a torch.nn.Module, got str"),
        (nn.Linear(64, 10), "cross_entropy", TypeError, "loss: expected a function of output and target, got str"),
        (bf.Bottleneck(64, 10), cross_entropy, ValueError, "module: expected a parameter to train"),
    ],
)
def test_errors_name_the_argument(digits, model, loss, error, message):
    with pytest.raises(error, match=message):
        bf.finetune(model, digits, loss=loss, epochs=1)
