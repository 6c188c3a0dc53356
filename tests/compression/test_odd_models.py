"""Odd models: right, or one clear refusal in the report."""

import copy

import pytest
import torch
from contract import FLOOR, relative_error
from torch import nn

import byol_fast as bf
from byol_fast.nn import SplitAttention

OPEN = {"gate": "none", "progress": False}
ROWS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Layers that are called as a function says."""

    def __init__(self, call, **layers):
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs, **named):
        return self.call(self, *inputs, **named)


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers if layer.rank is None}


def test_a_layer_never_called_is_refused():
    model = Model(lambda self, x: self.used(x), used=nn.Linear(16, 16), unused=nn.Linear(16, 16))
    compressed, report = bf.compress(model, ROWS, **OPEN)
    assert reasons(report) == {"unused": "it was not called by the calibration batches"}
    assert isinstance(compressed.used, bf.Bottleneck)


def test_a_layer_called_twice_is_fitted_to_both_calls():
    torch.manual_seed(0)
    model = Model(lambda self, x: self.layer(torch.relu(self.layer(x))), layer=nn.Linear(16, 16))
    _, report = bf.compress(model, ROWS, keep=0.5, sequential=True, **OPEN)
    assert report.layers[0].rank == 4
    full, _ = bf.compress(model, ROWS, keep=0.9, **OPEN)
    assert relative_error(full(ROWS).detach(), model(ROWS).double().detach()) < 0.5


def test_a_module_in_two_places_stays_one():
    layer = nn.Linear(16, 16)
    compressed, report = bf.compress(nn.Sequential(layer, nn.Tanh(), layer), ROWS, **OPEN)
    assert compressed[0] is compressed[2]
    assert len(report.layers) == 1


def test_weights_shared_by_two_layers_stay_shared():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    compressed, report = bf.compress(model, ROWS, **OPEN)
    assert compressed[0].encoder.weight is compressed[2].encoder.weight
    assert compressed[0].decoder.weight is compressed[2].decoder.weight
    assert not torch.equal(compressed[0].decoder.bias, compressed[2].decoder.bias)
    assert [layer.name for layer in report.layers] == ["0 (and 1 more)"]


def test_a_weight_shared_with_another_kind_of_layer_is_refused():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40))
    model[1].weight = model[0].weight
    compressed, report = bf.compress(model, torch.arange(40), **OPEN)
    assert all("its weight is shared with 1, which cannot share" in reason for reason in reasons(report).values())
    assert compressed[0].weight is compressed[1].weight


def test_a_model_under_autocast_is_calibrated_and_timed_there(clock):
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16))
    with torch.autocast("cpu", torch.bfloat16):
        compressed, report = bf.compress(model, ROWS, progress=False)
        assert compressed(ROWS).dtype == torch.bfloat16
    assert len(report.replaced) == 2
    assert compressed[0].encoder.weight.dtype == torch.float32

    def inside(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    assert len(bf.compress(model, ROWS, forward=inside, progress=False)[1].replaced) == 2


def test_a_frozen_model_is_compressed_and_stays_frozen():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 16)).requires_grad_(False)
    compressed, report = bf.compress(model, ROWS, **OPEN)
    assert len(report.replaced) == 2
    assert not any(parameter.requires_grad for parameter in compressed.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_model_is_compressed_without_gradients_too(context):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    expected, _ = bf.compress(model, ROWS, **OPEN)
    with context():
        compressed, _ = bf.compress(model, ROWS, **OPEN)
        assert torch.equal(compressed(ROWS), expected(ROWS))


def test_a_model_that_lets_no_gradients_through_is_fitted_by_its_inputs():
    model = Model(torch.no_grad()(lambda self, x: self.layer(x)), layer=nn.Linear(16, 16))
    compressed, report = bf.compress(model, ROWS, **OPEN)
    assert report.layers[0].rank == 4
    assert relative_error(compressed(ROWS), model(ROWS).double()) < 0.7


def test_a_layer_that_no_gradient_reaches_is_refused():
    model = Model(lambda self, x: self.head(self.body(x).detach()), body=nn.Linear(16, 16), head=nn.Linear(16, 16))
    _, report = bf.compress(model, ROWS, **OPEN)
    assert reasons(report) == {"body": "no gradient of the model's output reaches it: what it is worth is not known"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_what_they_are(dtype):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).to(dtype)
    compressed, report = bf.compress(model, ROWS.to(dtype), keep=0.6, **OPEN)
    assert len(report.replaced) == 2
    assert {parameter.dtype for parameter in compressed.parameters()} == {dtype}
    assert report.error < 0.7


def test_the_meta_device_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, device="meta"))
    compressed, report = bf.compress(model, ROWS, **OPEN)
    assert "meta device" in reasons(report)["0"]
    assert "meta device: there are no numbers" in reasons(report)["1"]
    assert compressed[1].weight.is_meta


def test_quantised_layers_are_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model = torch.ao.quantization.quantize_dynamic(model, {"0"})
    compressed, report = bf.compress(model, ROWS, **OPEN)
    assert "quantised" in reasons(report)["0"]
    assert isinstance(compressed[1], bf.Bottleneck)


def test_subclasses_and_hooked_layers_are_refused():
    class Custom(nn.Linear):
        pass

    model = nn.Sequential(Custom(16, 16), nn.Linear(16, 16), nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    model[1].register_forward_hook(lambda module, args, output: output)
    compressed, report = bf.compress(model, ROWS, **OPEN)
    assert "Custom is a subclass" in reasons(report)["0"]
    assert "hooks" in reasons(report)["1"]
    assert "ParametrizedLinear is a subclass" in reasons(report)["2"]
    assert len(compressed[1]._forward_hooks) == 1


def test_hooks_are_removed_also_when_calibration_raises():
    fast = torch.backends.mha.get_fastpath_enabled()
    seen = []

    def fails(self, x):
        seen.append(self.layer)
        self.layer(x)
        raise RuntimeError("in the middle")

    model = Model(fails, layer=nn.Linear(16, 16))
    with pytest.raises(RuntimeError, match="in the middle"):
        bf.compress(model, ROWS, **OPEN)
    assert not seen[0]._forward_hooks
    assert seen[0] is not model.layer
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_model_that_is_one_layer():
    compressed, report = bf.compress(nn.Linear(16, 16), ROWS, **OPEN)
    assert isinstance(compressed, bf.Bottleneck)
    assert report.layers[0].name == "(model)"


def test_layers_are_chosen_by_name_of_a_part_or_by_predicate():
    def model():
        return nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))})

    def run(**choice):
        chain = Model(lambda self, x: self.parts["b"](self.parts["a"](x)), parts=model())
        return [layer.name for layer in bf.compress(chain, ROWS, **choice, **OPEN)[1].layers]

    assert run(include="parts.b") == ["parts.b.0", "parts.b.1"]
    assert run(exclude=["parts.b.1", "parts.a"]) == ["parts.b.0"]
    assert run(include=lambda name, module: name.endswith("a")) == ["parts.a"]


def test_batches_are_arguments_by_place_or_name():
    model = Model(lambda self, x, y: {"sum": self.layer(x) + y, "count": torch.ones(1, dtype=torch.int64)})
    model.layer = nn.Linear(16, 16)
    half = ROWS[:32], ROWS[32:]
    by_place, _ = bf.compress(model, [half], **OPEN)
    by_name, _ = bf.compress(model, iter([{"x": half[0], "y": half[1]}]), **OPEN)
    assert torch.equal(by_place.layer.encoder.weight, by_name.layer.encoder.weight)


# ------------------------------------------------------------------------------------------- kinds of layers


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "bias": False},
        {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "reflect", "groups": 2},
    ],
)
def test_convolutions_see_the_patches_that_they_multiply(options):
    conv = nn.Conv2d(4, 8, **options, dtype=torch.float64)
    # Channels that depend on each other: of full rank in the weight, of half of it in the data.
    images = torch.randn(6, 4, 8, 8, dtype=torch.float64)
    images[:, 1::2] = 2 * images[:, ::2]
    model = nn.Sequential(conv)
    groups = conv.groups
    rank = min(conv.weight[0].numel() // 2, 8 // groups - 1)
    keep = rank * (conv.weight[0].numel() + 8 // groups) * groups / conv.weight.numel()
    if keep >= 1:
        rank, keep = rank - 1, keep * (rank - 1) / rank
    compressed, report = bf.compress(model, images, keep=keep, batch_size=4, **OPEN)
    assert compressed[0].rank <= rank
    output = conv(images).detach().transpose(0, 1).flatten(1)
    output = output - output.mean(dim=1, keepdim=True)
    left = sum(torch.linalg.svdvals(part)[rank:].square().sum() for part in output.chunk(groups)).sqrt()
    assert report.error <= 1.2 * float(left / conv(images).norm().detach()) + 1e-3


def test_depthwise_convolutions_have_nothing_to_gain():
    compressed, report = bf.compress(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), torch.randn(2, 4, 6, 6), **OPEN)
    assert reasons(report) == {"0": "break-even rank 0: a bottleneck of rank 1 has no fewer weights"}
    assert type(compressed[0]) is nn.Conv2d


def test_embeddings_are_exact_where_few_entries_occur():
    model = nn.Sequential(nn.Embedding(60, 16, padding_idx=0), nn.Linear(16, 4))
    entries = torch.randint(0, 5, (32, 7))
    compressed, report = bf.compress(model, entries, keep=0.5, include="0", **OPEN)
    assert isinstance(compressed[0], bf.BottleneckEmbedding)
    assert compressed[0].padding_idx == 0
    assert report.error < 1e-3
    limited = nn.Sequential(nn.Embedding(60, 16, max_norm=1.0))
    assert "max_norm" in reasons(bf.compress(limited, entries, **OPEN)[1])["0"]


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


def test_attention_is_replaced_projection_by_projection_off_the_fast_path():
    model = encoder()
    rows = torch.randn(8, 6, 16)
    compressed, report = bf.compress(model, rows, keep=0.7, **OPEN)
    assert isinstance(compressed.layers[0].self_attn, SplitAttention)
    assert {layer.name for layer in report.layers} >= {"layers.0.self_attn.q_proj", "layers.1.self_attn.out_proj"}
    padding = torch.zeros(8, 6, dtype=torch.bool)
    padding[:, 4:] = True
    with torch.no_grad():
        for mask in (None, padding):
            expected = model(rows, src_key_padding_mask=mask)[:, :4]
            found = compressed(rows, src_key_padding_mask=mask)[:, :4]
            assert relative_error(found, expected.double()) < 0.6


def test_attention_none_of_which_is_replaced_stays_what_it_was():
    model = encoder()
    compressed, report = bf.compress(model, torch.randn(8, 6, 16), include=["layers.0.linear1"], **OPEN)
    assert [layer.name for layer in report.replaced] == ["layers.0.linear1"]
    assert type(compressed.layers[0].self_attn) is nn.MultiheadAttention
    with torch.no_grad():
        compressed(torch.randn(8, 6, 16), src_key_padding_mask=torch.zeros(8, 6, dtype=torch.bool))
    odd = Model(lambda self, x: self.attention(x, x, x), attention=nn.MultiheadAttention(16, 2, add_bias_kv=True))
    assert "add_bias_kv" in reasons(bf.compress(odd, torch.randn(4, 6, 16), **OPEN)[1])["attention"]


def test_conv1d_of_transformers_is_a_transposed_linear_layer():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(20, 16)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    model = nn.Sequential(layer)
    rows = torch.randn(64, 4) @ torch.randn(4, 16)
    compressed, report = bf.compress(model, rows, keep=0.5, **OPEN)
    assert compressed[0].rank == 4
    assert relative_error(compressed(rows).detach(), model(rows).double().detach()) < 1e-4
    assert report.layers[0].kind == "Conv1D"


@pytest.mark.parametrize("architecture", ["bert", "albert"])
def test_models_of_transformers(architecture):
    from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "bert":
        model = BertModel(BertConfig(**sizes, intermediate_size=32)).eval()
    else:
        model = AlbertModel(AlbertConfig(**sizes, intermediate_size=32, embedding_size=8)).eval()
    batch = {"input_ids": torch.randint(0, 50, (8, 6)), "attention_mask": torch.ones(8, 6, dtype=torch.int64)}
    before = copy.deepcopy(model.state_dict())
    compressed, report = bf.compress(model, [batch], include="encoder", sequential=True, keep=0.7, **OPEN)
    assert report.replaced
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected, found = model(**batch).last_hidden_state, compressed(**batch).last_hidden_state
    assert relative_error(found.detach(), expected.double().detach()) < 0.5


def test_full_rank_is_the_same_function():
    # Of 4 outputs and 16 inputs, rank 3 is the last with fewer weights; the data need no more.
    rows = (torch.randn(64, 3) @ torch.randn(3, 16)).double()
    model = nn.Sequential(nn.Linear(16, 4)).double()
    compressed, _ = bf.compress(model, rows, keep=0.99, **OPEN)
    assert compressed[0].rank == 3
    assert relative_error(compressed(rows).detach(), model(rows).detach()) < 1e-3 + FLOOR[torch.float64]
