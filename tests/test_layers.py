"""Convolutions, embeddings and attention as bottlenecks: the closest of their rank, in every option; replacing."""

import copy

import pytest
import torch
from contract import FLOOR, relative_error
from torch import nn

import byol_fast as bf
from byol_fast.nn import SplitAttention

F64 = torch.float64

CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3},
    "strides": {"kernel_size": (3, 5), "stride": (2, 1)},
    "padding": {"kernel_size": 3, "padding": (2, 1)},
    "same": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "groups": {"kernel_size": 3, "groups": 3},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False},
    "all": {"kernel_size": (3, 2), "stride": 2, "padding": 1, "dilation": (2, 1), "groups": 2},
}


@pytest.fixture(params=CONVOLUTIONS)
def convolution(request):
    return nn.Conv2d(6, 12, **CONVOLUTIONS[request.param], dtype=F64)


def full_rank(conv):
    return min(conv.weight[0].numel(), conv.out_channels // conv.groups)


def test_a_convolution_at_full_rank_is_the_same_one_and_comes_back(convolution):
    layer = bf.BottleneckConv2d.from_conv2d(convolution, full_rank(convolution))
    images = torch.randn(2, 6, 11, 9, dtype=F64)
    assert relative_error(layer(images), convolution(images)) < FLOOR[F64]
    assert relative_error(layer(images[0]), convolution(images[0])) < FLOOR[F64]
    back = layer.to_conv2d()
    assert repr(back) == repr(convolution)
    assert relative_error(back(images), convolution(images)) < FLOOR[F64]


def test_a_convolution_of_low_rank_is_the_closest_in_its_weight():
    conv = nn.Conv2d(5, 8, 3, bias=False, dtype=F64)
    weight = bf.BottleneckConv2d.from_conv2d(conv, 3).to_conv2d().weight.flatten(1)
    left, values, right = torch.linalg.svd(conv.weight.flatten(1), full_matrices=False)
    assert relative_error(weight, left[:, :3] * values[:3] @ right[:3]) < 1e-10


def test_a_convolution_is_the_closest_in_its_output_on_data():
    conv = nn.Conv2d(4, 6, 3, groups=2, dtype=F64)
    images = torch.randn(8, 4, 6, 6, dtype=F64).cumsum(dim=2) + 3
    patches = nn.functional.unfold(images, 3).transpose(1, 2).flatten(0, 1).unflatten(1, (2, -1))
    mean = patches.mean(dim=0)
    centered = patches - mean
    covariance = torch.einsum("ngi,ngj->gij", centered, centered)
    by_data = bf.BottleneckConv2d.from_conv2d(conv, 2, covariance=covariance, mean=mean)
    by_weight = bf.BottleneckConv2d.from_conv2d(conv, 2)
    assert relative_error(by_data(images), conv(images)) < 0.7 * relative_error(by_weight(images), conv(images))
    # Truncated SVD of the outputs themselves bounds what any layer of this rank can do.
    outputs = (conv(images) - conv(images).mean(dim=(0, 2, 3), keepdim=True)).transpose(0, 1).flatten(1)
    best = sum(torch.linalg.svdvals(part)[2:].square().sum() for part in outputs.chunk(2)).sqrt() / conv(images).norm()
    assert relative_error(by_data(images), conv(images)) == pytest.approx(best.item(), rel=1e-6)


def test_an_embedding_is_the_closest_where_it_is_looked_up():
    embedding = nn.Embedding(50, 12, padding_idx=3, dtype=F64)
    frequency = torch.zeros(50, dtype=F64)
    frequency[:4] = 1
    layer = bf.BottleneckEmbedding.from_embedding(embedding, 4, frequency=frequency)
    assert layer.padding_idx == 3
    entries = torch.tensor([[0, 1], [2, 3]])
    assert relative_error(layer(entries), embedding(entries)) < 1e-8
    full = bf.BottleneckEmbedding.from_embedding(embedding, 12)
    assert relative_error(full.to_embedding().weight, embedding.weight) < FLOOR[F64]
    assert layer(torch.empty(0, dtype=torch.int64)).shape == (0, 12)


def attention_pair(**options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, dtype=F64, **options).eval()
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    return attention, SplitAttention(attention)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 7, "vdim": 5}])
def test_split_attention_computes_what_multi_head_attention_does(options, need_weights):
    attention, split = attention_pair(**options)
    shape = (2, 5) if options.get("batch_first") else (5, 2)
    query = torch.randn(*shape, 12, dtype=F64)
    key = torch.randn(*shape, options.get("kdim", 12), dtype=F64)
    value = torch.randn(*shape, options.get("vdim", 12), dtype=F64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    masks = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": torch.randn(6, 5, 5, dtype=F64), "key_padding_mask": padding.double()},
    ]
    for mask in masks:
        expected = attention(query, key, value, need_weights=need_weights, **mask)
        found = split(query, key, value, need_weights=need_weights, **mask)
        assert relative_error(found[0], expected[0]) < FLOOR[F64], mask
        assert (found[1] is None) == (expected[1] is None)
        if need_weights:
            assert relative_error(found[1], expected[1]) < FLOOR[F64], mask
    one = (query[:, 0], key[:, 0], value[:, 0])
    assert relative_error(split(*one)[0], attention(*one)[0]) < FLOOR[F64]


def test_attention_with_extra_keys_is_declined():
    with pytest.raises(ValueError, match="add_bias_kv=False"):
        SplitAttention(nn.MultiheadAttention(8, 2, add_bias_kv=True))


# ------------------------------------------------------------------------------------------------------ replacing


def shared_model():
    first, second, third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, first, third)


def test_replaced_layers_train_and_shared_ones_stay_shared():
    model = shared_model()
    assert bf.replace_linear(model, ["0", "2"], 3, activation="relu") is model
    assert isinstance(model[0], bf.Bottleneck)
    assert model[0] is model[3]
    assert model[0].encoder.weight is model[2].encoder.weight
    assert model[0].decoder.weight is model[2].decoder.weight
    assert model[0].decoder.bias is not model[2].decoder.bias
    assert type(model[4]) is nn.Linear
    model(torch.randn(5, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_layers_are_replaced_by_predicate():
    model = bf.replace_linear(shared_model(), lambda name, linear: linear.out_features == 4, 2)
    assert [type(layer) for layer in model[:4]] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert isinstance(model[4], bf.Bottleneck)


@pytest.mark.parametrize(
    ("model", "names", "rank", "error", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), ["1"], 2, ValueError, "names: expected names of 0, got '1'"),
        (nn.Sequential(nn.Linear(4, 4)), [], 2, ValueError, "names: expected one or more of 0, got none that matched"),
        (nn.Sequential(nn.Linear(4, 3)), "0", 4, ValueError, r"rank: .* min\(in_features, out_features\) of 0 = 3"),
        (nn.Linear(4, 4), [""], 2, ValueError, "model: expected linear layers inside of it, got one"),
        ("model", "0", 2, TypeError, "model: expected a torch.nn.Module, got str"),
    ],
)
def test_what_cannot_be_replaced_is_named(model, names, rank, error, message):
    with pytest.raises(error, match=message):
        bf.replace_linear(model, names, rank)


def test_merging_takes_the_layers_from_the_break_even_rank_on():
    # 8·6/(8 + 6) = 3.4
    model = nn.Sequential(bf.Bottleneck(8, 3, 6), bf.Bottleneck(6, 4, 8), bf.Bottleneck(8, 7, 8, activation="relu"))
    rows = torch.randn(5, 8)
    expected = model(rows)
    merged = bf.merge(copy.deepcopy(model))
    assert [type(layer) for layer in merged] == [bf.Bottleneck, nn.Linear, bf.Bottleneck]
    assert relative_error(merged(rows), expected.double()) < FLOOR[torch.float32]
    assert type(bf.merge(model[1])) is nn.Linear
    assert type(bf.merge(model, "0")[0]) is nn.Linear
    with pytest.raises(ValueError, match="to_linear: expected a layer with activation identity, got relu"):
        bf.merge(model, "2")


def test_merging_knows_convolutions_and_embeddings():
    model = nn.Sequential(bf.BottleneckEmbedding(9, 3, 4), bf.BottleneckConv2d(4, 2, 4, 3, groups=2, padding=1))
    expected = model[0](torch.arange(9)), model[1](torch.ones(1, 4, 5, 5))
    merged = bf.merge(model, lambda name, layer: True)
    assert [type(layer) for layer in merged] == [nn.Embedding, nn.Conv2d]
    assert relative_error(merged[0](torch.arange(9)), expected[0].double()) < FLOOR[torch.float32]
    assert relative_error(merged[1](torch.ones(1, 4, 5, 5)), expected[1].double()) < FLOOR[torch.float32]
