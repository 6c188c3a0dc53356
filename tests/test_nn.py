"""Layers: what they compute, how they load and copy, and the linear algebra between them and nn.Linear."""

import copy
import io
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import byol_fast as bf
from byol_fast.reference import ACTIVATIONS

OPTIONS = [{}, {"bias": False}, {"tied": True}, {"tied": True, "bias": False}, {"residual": True}]


def make(*sizes, seed=0, **options):
    """A layer with weights and biases away from the initial values."""
    torch.manual_seed(seed)
    layer = bf.Bottleneck(*sizes, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return layer


def by_modules(layer, input):
    output = layer.decode(layer.encode(input))
    return input + output if layer.residual else output


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().data).float() / 16


# ------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_fused_forward_is_what_the_submodules_compute(digits, options, activation):
    layer = make(64, 7, activation=activation, **options)
    torch.testing.assert_close(layer(digits), by_modules(layer, digits))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("given", [False, True])
def test_reconstruction_loss_is_the_loss_of_the_output(digits, options, given, reduction):
    layer = make(64, 7, activation="silu", **options).double()
    input = digits[:50].double()
    target = input.cos() if given else None
    loss = layer.reconstruction_loss(input, target, reduction)
    expected = nn.functional.mse_loss(
        by_modules(layer, input), input if target is None else target, reduction=reduction
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss.sum(), list(layer.parameters()))
    for gradient, true in zip(gradients, torch.autograd.grad(expected.sum(), list(layer.parameters())), strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-10, atol=1e-10)


def test_leading_dimensions_are_kept():
    layer = make(6, 3, 4)
    input = torch.randn(2, 5, 6)
    assert layer.encode(input).shape == (2, 5, 3)
    assert layer(input).shape == (2, 5, 4)
    assert layer(torch.randn(6)).shape == (4,)
    assert layer(torch.randn(0, 6)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_dtypes_follow_to_and_the_constructor(tied, dtype):
    input = torch.randn(5, 8, dtype=dtype)
    for layer in (bf.Bottleneck(8, 3, tied=tied, dtype=dtype), bf.Bottleneck(8, 3, tied=tied).to(dtype)):
        assert layer(input).dtype == layer.reconstruction_loss(input).dtype == dtype


def test_autocast_casts_as_linear_does():
    layer, input = make(8, 3), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(input).dtype == torch.bfloat16
        assert layer.reconstruction_loss(input).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_loss_is_torchs(reduction):
    input, target = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    loss, expected = bf.MSELoss(reduction)(input, target), nn.MSELoss(reduction=reduction)(input, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), input)[0] for x in (loss, expected)))
    assert repr(bf.MSELoss(reduction)) == f"MSELoss(reduction={reduction!r})"


# ------------------------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"bias": False}, {"dtype": torch.bfloat16}])
def test_a_new_layer_is_an_orthogonal_projection(digits, options):
    layer = bf.Bottleneck(64, 7, **options)
    weight = layer.encoder.weight.double()
    near = 1e-2 if layer.encoder.weight.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(weight @ weight.T, torch.eye(7, dtype=torch.float64), rtol=0, atol=near)
    assert torch.equal(layer.decoder.weight, layer.encoder.weight.T)
    input = digits.to(layer.encoder.weight.dtype)
    assert layer.reconstruction_loss(input) < input.square().mean()


def test_other_shapes_of_new_layers():
    wide = bf.Bottleneck(4, 9)
    torch.testing.assert_close(wide(torch.eye(4)), torch.eye(4))
    uneven = bf.Bottleneck(6, 3, 5).decoder.weight
    torch.testing.assert_close(uneven.T @ uneven, torch.eye(3))
    input = torch.randn(3, 6)
    assert torch.equal(bf.Bottleneck(6, 3, residual=True)(input), input)


def test_the_seed_decides_the_initial_values():
    layers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layers.append(bf.Bottleneck(6, 3))
    assert torch.equal(layers[0].encoder.weight, layers[1].encoder.weight)
    assert not torch.equal(layers[0].encoder.weight, layers[2].encoder.weight)


# ---------------------------------------------------------------------------------------------- state dict, copies


def test_a_checkpoint_of_linear_layers_loads_both_ways():
    pair = nn.ModuleDict({"encoder": nn.Linear(8, 3), "decoder": nn.Linear(3, 5)})
    layer = bf.Bottleneck(8, 3, 5)
    layer.load_state_dict(pair.state_dict())
    assert type(layer.encoder) is type(layer.decoder) is nn.Linear
    input = torch.randn(4, 8)
    torch.testing.assert_close(layer(input), pair["decoder"](pair["encoder"](input)))
    pair.load_state_dict(bf.Bottleneck(8, 3, 5).state_dict())


def test_a_tied_layer_has_one_weight():
    layer = bf.Bottleneck(8, 3, tied=True)
    assert list(layer.state_dict()) == ["encoder.weight", "encoder.bias", "decoder.bias"]
    assert layer.decoder.weight.data_ptr() == layer.encoder.weight.data_ptr()
    assert sorted(name for name, _ in layer.named_parameters()) == sorted(layer.state_dict())
    assert [name for name, _ in layer.named_modules()] == ["", "encoder", "decoder"]


def test_tied_and_untied_checkpoints():
    tied, untied = nn.Sequential(make(8, 3, tied=True)), nn.Sequential(make(8, 3, seed=1))
    with pytest.raises(RuntimeError, match=r"0\.decoder\.weight: expected the transpose of encoder\.weight, because"):
        tied.load_state_dict(untied.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\.decoder\.weight\""):
        untied.load_state_dict(tied.state_dict())
    with torch.no_grad():
        untied[0].decoder.weight.copy_(untied[0].encoder.weight.T)
    state = untied.state_dict()
    tied.load_state_dict(state)
    assert "0.decoder.weight" in state
    input = torch.randn(4, 8)
    torch.testing.assert_close(tied(input), untied(input))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_built_on_meta_loads(tied, assign):
    layer = make(8, 3, tied=tied)
    empty = bf.Bottleneck(8, 3, tied=tied, device="meta")
    assert empty(torch.empty(2, 8, device="meta")).shape == (2, 8)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), assign=assign)
    input = torch.randn(4, 8)
    assert torch.equal(empty(input), layer(input))


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded])
@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_stands_on_its_own(tied, duplicate):
    layer = make(8, 3, tied=tied)
    other = duplicate(layer)
    input = torch.randn(4, 8)
    before = layer(input)
    assert torch.equal(other(input), before)
    with torch.no_grad():
        other.encoder.weight.zero_()
    assert torch.equal(other.decoder.weight, torch.zeros(8, 3)) == tied
    assert torch.equal(layer(input), before)


def test_a_tied_decoder_follows_a_replaced_encoder():
    layer = make(8, 3, tied=True)
    layer.encoder = nn.Linear(8, 3)
    assert torch.equal(layer.decoder.weight, layer.encoder.weight.T)


# ------------------------------------------------------------------------------------- hooks, adapters, compilers


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_of_the_submodules_run(register, part, tied):
    layer, calls = make(8, 3, tied=tied), []
    handle = getattr(getattr(layer, part), register)(lambda *_: calls.append(part))
    layer(torch.randn(4, 8, requires_grad=True)).sum().backward()
    layer.reconstruction_loss(torch.randn(4, 8, requires_grad=True)).backward()
    assert calls == [part, part]
    handle.remove()
    layer(torch.randn(4, 8))
    assert calls == [part, part]


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, input):
        return self.base(input) + 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_wrapped_submodule_is_called(part, tied):
    layer = make(8, 3, tied=tied)
    input = torch.randn(4, 8)
    before = layer(input)
    setattr(layer, part, Adapter(getattr(layer, part)))
    if part == "encoder" and tied:
        layer.encoder.weight = layer.encoder.base.weight
    after = layer(input)
    offset = torch.ones(8) if part == "decoder" else layer.decoder.weight.sum(1)
    torch.testing.assert_close(after, before + offset)
    torch.testing.assert_close(layer.reconstruction_loss(input), nn.functional.mse_loss(after, input))


@pytest.mark.parametrize("tied", [False, True])
def test_a_parametrized_weight_is_used(tied):
    layer = make(8, 3, tied=tied)
    nn.utils.parametrizations.orthogonal(layer.encoder)
    input = torch.randn(4, 8)
    torch.testing.assert_close(layer(input), by_modules(layer, input))
    assert layer.encoder.parametrizations.weight.original.grad is None
    layer.reconstruction_loss(input).backward()
    assert layer.encoder.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("options", OPTIONS)
def test_compile_and_export(options):
    layer, input = make(8, 3, **options), torch.randn(4, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), layer(input))
    loss = torch.compile(layer.reconstruction_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(input), layer.reconstruction_loss(input))
    exported = torch.export.export(layer, (input,))
    torch.testing.assert_close(exported.module()(input), layer(input))
    assert set(exported.state_dict) == set(layer.state_dict())


# -------------------------------------------------------------------------------------------------- linear algebra


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(20, 12), (12, 20)])
def test_from_linear_is_the_truncated_svd(sizes, dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(*sizes, bias=bias).to(dtype)
    layer = bf.Bottleneck.from_linear(linear, 5)
    assert layer.encoder.weight.dtype == dtype
    left, values, right = torch.linalg.svd(linear.weight.detach().double())
    best = (left[:, :5] * values[:5]) @ right[:5]
    product = layer.decoder.weight.detach().double() @ layer.encoder.weight.detach().double()
    rounding = torch.finfo(dtype).eps * float(best.norm())
    assert float((product - best).norm()) < 4 * max(rounding, 1e-12)
    torch.testing.assert_close(layer.encoder.weight.norm(dim=1), layer.decoder.weight.norm(dim=0), rtol=1e-2, atol=0)
    assert (layer.encoder.bias is not None) == bias
    if bias:
        assert torch.equal(layer.decoder.bias, linear.bias)


def test_from_linear_at_full_rank_is_the_linear_layer():
    torch.manual_seed(0)
    linear = nn.Linear(9, 6).double().eval()
    layer = bf.Bottleneck.from_linear(linear, 6)
    input = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(input), linear(input), rtol=1e-10, atol=1e-12)
    assert not layer.training


@torch.no_grad()
def output_error(layer, linear, input):
    return float((layer(input) - linear(input)).square().sum())


def test_from_linear_with_covariance_is_optimal_on_the_data(digits):
    torch.manual_seed(0)
    linear, input = nn.Linear(64, 32).double(), digits.double()
    layer = bf.Bottleneck.from_linear(linear, 6, covariance=input.T @ input)
    weight = linear.weight.detach()
    outputs = input @ weight.T
    tail = float(torch.linalg.svdvals(outputs)[6:].square().sum())
    # Three of digits' 64 pixels are constant zero: a singular covariance.
    assert output_error(layer, linear, input) == pytest.approx(tail, rel=1e-9)
    assert output_error(bf.Bottleneck.from_linear(linear, 6), linear, input) > 1.5 * tail


def test_from_linear_with_mean_is_the_best_affine_layer(digits):
    torch.manual_seed(0)
    linear, input = nn.Linear(64, 32, bias=False).double(), digits.double()
    mean = input.mean(0)
    layer = bf.Bottleneck.from_linear(linear, 6, covariance=torch.cov(input.T), mean=mean)
    outputs = (input - mean) @ linear.weight.detach().T
    tail = float(torch.linalg.svdvals(outputs)[6:].square().sum())
    assert output_error(layer, linear, input) == pytest.approx(tail, rel=1e-9)


def test_from_linear_keeps_directions_the_calibration_never_showed():
    torch.manual_seed(0)
    linear, seen = nn.Linear(10, 10, bias=False).double(), torch.randn(3, 10, dtype=torch.float64)
    layer = bf.Bottleneck.from_linear(linear, 9, covariance=seen.T @ seen)
    unseen = torch.linalg.svd(seen).Vh[3:]
    assert output_error(layer, linear, seen) < 1e-9
    assert output_error(layer, linear, unseen) < 0.2 * float(linear(unseen).square().sum())


@pytest.mark.parametrize("options", OPTIONS)
def test_to_linear_computes_the_same(options):
    layer = make(8, 3, **options).double()
    input = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(layer.to_linear()(input), layer(input), rtol=1e-13, atol=1e-13)
    assert (layer.to_linear().bias is None) == (options.get("bias") is False)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("informed", [False, True])
def test_canonicalize_does_not_change_the_function(digits, options, informed):
    layer = make(64, 9, **options).double()
    input = digits.double()
    moments = {"covariance": torch.cov(input.T), "mean": input.mean(0)} if informed else {}
    before = layer(input)
    torch.testing.assert_close(layer.canonicalize(**moments)(input), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer(input), before)


@pytest.mark.parametrize("sizes", [(4, 9), (9, 6, 4), (4, 6, 9)])
def test_canonicalize_of_a_rank_above_the_sizes(sizes):
    layer = make(*sizes).double()
    input = torch.randn(5, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(layer.canonicalize()(input), layer(input), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_a_canonical_code_is_centred_uncorrelated_and_descending(digits, tied):
    input = digits.double()
    layer = make(64, 9, tied=tied).double().canonicalize(covariance=torch.cov(input.T), mean=input.mean(0))
    code = layer.encode(input)
    torch.testing.assert_close(code.mean(0), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12)
    covariance = torch.cov(code.T)
    off_diagonal = covariance - covariance.diag().diag()
    assert float(off_diagonal.abs().max()) < 1e-10 * float(covariance.max())
    carried = covariance.diag() * layer.decoder.weight.square().sum(0)
    assert tied or (carried.diff() <= 0).all()
    assert not tied or (covariance.diag().diff() <= 0).all()


def test_a_canonical_layer_cut_short_is_optimal(digits):
    """However a PCA layer is mixed up, canonical order recovers the best layer of every smaller rank."""
    input = digits.double()
    mean, covariance = input.mean(0), torch.cov(input.T, correction=0)
    values, axes = torch.linalg.eigh(covariance)
    mixing = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = bf.Bottleneck(64, 9, dtype=torch.float64)
    with torch.no_grad():
        layer.encoder.weight.copy_(mixing @ axes[:, -9:].T)
        layer.encoder.bias.copy_(-layer.encoder.weight @ mean)
        layer.decoder.weight.copy_(axes[:, -9:] @ mixing.inverse())
        layer.decoder.bias.copy_(mean)
    canonical = layer.canonicalize(covariance=covariance, mean=mean)
    for rank in range(1, 10):
        best = float(values[:-rank].sum()) / 64
        assert float(canonical.truncate(rank).reconstruction_loss(input)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("options", [*OPTIONS, {"activation": "gelu"}])
def test_truncated_codes_are_nested(options):
    layer = make(8, 5, **options)
    input = torch.randn(4, 8)
    short = layer.truncate(2)
    torch.testing.assert_close(short.encode(input), layer.encode(input)[:, :2])
    assert (short.rank, short.activation, short.residual, short.tied) == (
        2,
        layer.activation,
        layer.residual,
        layer.tied,
    )
    assert torch.equal(layer.truncate(5)(input), layer(input))


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 3), {}, ValueError, "in_features: expected an integer ≥ 1, got 0"),
        ((8, 0), {}, ValueError, "rank: expected an integer ≥ 1, got 0"),
        ((8, 2.5), {}, TypeError, "rank: expected an integer, got float"),
        ((8, 3, -1), {}, ValueError, "out_features: expected an integer ≥ 1, got -1"),
        ((8, 3), {"activation": "swish"}, ValueError, "activation: expected one of identity, .*, got 'swish'"),
        ((8, 3, 5), {"tied": True}, ValueError, "tied: expected out_features = in_features = 8, got out_features = 5"),
        ((8, 3, 5), {"residual": True}, ValueError, "residual: expected out_features = in_features = 8, got .* = 5"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        bf.Bottleneck(*arguments, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bf.Bottleneck.from_linear(nn.Identity(), 2),
            TypeError,
            "linear: expected a torch.nn.Linear, got Identity",
        ),
        (
            lambda: bf.Bottleneck.from_linear(nn.Linear(8, 5), 6),
            ValueError,
            r"rank: expected 1 ≤ rank ≤ min\(in.* = 5, got 6",
        ),
        (
            lambda: bf.Bottleneck.from_linear(nn.Linear(8, 5), 2, covariance=torch.eye(5)),
            ValueError,
            r"covariance: expected shape \[in_features, in_features\] = \[8, 8\], got \[5, 5\]",
        ),
        (
            lambda: bf.Bottleneck.from_linear(nn.Linear(2, 5), 2, covariance=torch.full((2, 2), float("nan"))),
            ValueError,
            "covariance: expected finite numbers, got NaN or Inf",
        ),
        (
            lambda: bf.Bottleneck.from_linear(nn.Linear(8, 5), 2, mean=torch.zeros(5)),
            ValueError,
            r"mean: expected shape \[in_features\] = \[8\], got \[5\]",
        ),
        (
            lambda: bf.Bottleneck(8, 3, activation="relu").to_linear(),
            ValueError,
            "to_linear: expected .* identity, got relu",
        ),
        (
            lambda: bf.Bottleneck(8, 3, activation="relu").canonicalize(),
            ValueError,
            "canonicalize: expected .*, got relu",
        ),
        (lambda: bf.Bottleneck(8, 3).truncate(4), ValueError, "rank: expected 1 ≤ rank ≤ the layer's rank = 3, got 4"),
    ],
)
def test_what_cannot_be_done_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_repr_tells_the_options():
    layer = bf.Bottleneck(8, 3, activation="relu", residual=True, tied=True)
    assert layer.extra_repr() == "8 → 3 → 8, activation=relu, residual, tied"
