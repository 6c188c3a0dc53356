"""deploy and load: the same predictions where only torch can be imported; damage is named; writes are whole."""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

import byol_fast as bf
from byol_fast.phases import plain

# What a machine without this package, and without all it brings, can import.
ONLY_TORCH = """
import sys
class Bare:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in ("byol_fast", "safetensors", "tqdm", "sklearn", "scipy")
        return None if absent else self.finder.find_spec(name, path, target)
# Every finder: an editable installation has one of its own.
sys.meta_path = [Bare(finder) for finder in sys.meta_path]
try:
    import byol_fast
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("byol_fast can be imported")
import torch
rows = torch.load(sys.argv[2])
"""
LOAD = {
    "safetensors": "from plain import load; model = load(sys.argv[1])",
    "torch_export": "model = torch.export.load(sys.argv[1]).module()",
}


def in_a_fresh_process(format, path, rows, folder):
    torch.save(rows, folder / "rows.pt")
    shutil.copy(plain.__file__, folder)
    code = ONLY_TORCH + LOAD[format] + "\ntorch.save(model(rows), sys.argv[3])"
    arguments = [str(path), str(folder / "rows.pt"), str(folder / "output.pt")]
    # Isolated, so that it sees the copied file only because we say so.
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    subprocess.run([sys.executable, "-I", "-c", code, *arguments], check=True, timeout=300)
    return torch.load(folder / "output.pt")


def classifier(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), bf.Bottleneck(64, 10, **options), nn.ReLU(), nn.Linear(64, 10)).eval()


@pytest.mark.parametrize("format", ["safetensors", "torch_export"])
def test_three_phases_then_a_fresh_process_with_only_torch_predicts_the_same(digits, tmp_path, format):
    rows, _ = digits
    model = classifier()
    bf.pretrain(model[1], rows)
    bf.finetune(model, digits, loss=nn.functional.cross_entropy, epochs=5)
    bf.deploy(model, tmp_path / "model", format=format, example=rows[:2])
    expected = model(rows).detach()
    output = in_a_fresh_process(format, tmp_path / "model", rows, tmp_path).detach()
    assert torch.equal(output.argmax(1), expected.argmax(1))
    assert float((output - expected).norm() / expected.norm()) < 2e-6
    again = bf.load(tmp_path / "model")(rows).detach()
    assert torch.equal(again, output)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh"])
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"bias": False}, {"dtype": torch.float64}])
def test_bottlenecks_become_plain_linears_that_compute_the_same(tmp_path, activation, options):
    model = nn.Sequential(bf.Bottleneck(20, 6, activation=activation, **options))
    bf.deploy(model, tmp_path / "model.safetensors")
    loaded = bf.load(tmp_path / "model.safetensors")
    assert {type(module) for module in loaded.modules()} <= {
        nn.Sequential,
        nn.Linear,
        *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh),
    }
    rows = torch.randn(50, 20, dtype=options.get("dtype", torch.float32))
    expected = model(rows).detach()
    tolerance = 1e-14 if rows.dtype == torch.float64 else 2e-6
    assert loaded(rows).dtype == rows.dtype
    assert float((loaded(rows) - expected).norm() / expected.norm()) < tolerance


def test_half_precision_stays_half_precision(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4, dtype=torch.bfloat16))
    bf.deploy(model, tmp_path / "model.safetensors")
    assert torch.equal(bf.load(tmp_path / "model.safetensors")[0].weight, model[0].weight)
    assert bf.load(tmp_path / "model.safetensors")[0].weight.dtype == torch.bfloat16


SAMPLES = {
    "Linear": (3, 4),
    "Bilinear": (2, 3, 4),
    "Embedding": (5, 3, 1),
    "Unflatten": (1, (2, 3)),
    "GroupNorm": (2, 4),
    "LayerNorm": ((4, 2), 1e-3),
    "RMSNorm": (4,),
    "PixelShuffle": (2,),
    "Upsample": (None, 2.0),
    "Dropout": (0.3,),
    "LeakyReLU": (0.3,),
    "ELU": (0.7,),
    "GELU": ("tanh",),
    "Softplus": (2,),
    "Softmax": (1,),
    "LogSoftmax": (-1,),
    **{f"Conv{d}d": (4, 6, 3, 2, 1, 1, 2, False, "reflect" if d < 3 else "zeros") for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": (4, 6, 3, 2, 1, 1) for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": (4, 1e-3, 0.2) for d in (1, 2, 3)},
    **{f"{kind}Pool{d}d": (3, 2) for kind in ("Max", "Avg") for d in (1, 2)},
    **{f"AdaptiveAvgPool{d}d": (3,) for d in (1, 2)},
}


@pytest.mark.parametrize("name", plain.LAYERS)
def test_every_layer_comes_back_as_it_was_made(tmp_path, name):
    model = nn.Sequential(getattr(nn, name)(*SAMPLES.get(name, ())))
    bf.deploy(model, tmp_path / "model.safetensors")
    loaded = bf.load(tmp_path / "model.safetensors")
    assert repr(loaded) == repr(model)
    assert {key: list(value.shape) for key, value in loaded.state_dict().items()} == {
        key: list(value.shape) for key, value in model.state_dict().items()
    }


def test_the_documented_lines_load_it_with_torch_and_safetensors(digits, tmp_path):
    from collections import OrderedDict

    model = classifier(activation="gelu_tanh")
    bf.deploy(model, tmp_path / "model.safetensors")
    code = bf.deploy.__doc__.split("::\n\n", 1)[1].split("\n    * ``", 1)[0]
    scope = {"torch": torch, "OrderedDict": OrderedDict, "json": json, "path": tmp_path / "model.safetensors"}
    scope["safetensors"] = importlib.import_module("safetensors")
    exec("if True:\n" + code, scope)
    output = scope["model"].eval()(digits[0])
    assert torch.equal(output.argmax(1), model(digits[0]).argmax(1))


def test_deploying_changes_neither_model_nor_mode(digits, tmp_path):
    model = classifier(tied=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for format in ("safetensors", "torch_export"):
        bf.deploy(model, tmp_path / "model", format=format, example=digits[0][:4])
    assert isinstance(model[1], bf.Bottleneck)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_torch_export_takes_what_a_file_of_layers_cannot(digits, tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bf.Bottleneck(64, 6, residual=True)

        def forward(self, input):
            return self.inner(input) * self.inner.encode(input).sum(-1, keepdim=True)

    torch.manual_seed(0)
    model = Wide()
    nn.init.normal_(model.inner.decoder.weight)
    bf.deploy(model, tmp_path / "model.pt2", format="torch_export", example=digits[0][:2])
    expected = model(digits[0]).detach()
    found = bf.load(tmp_path / "model.pt2")(digits[0]).detach()
    assert float((found - expected).norm() / expected.norm()) < 2e-6


# ------------------------------------------------------------------------------------------------------ errors


class Custom(nn.Linear):
    pass


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (Custom(4, 4), {}, ValueError, "model: expected nn.Sequential, Bottleneck or a plain layer .*, got Custom"),
        (nn.Sequential(nn.Tanh(), Custom(4, 4)), {}, ValueError, r"model.1: expected .* deploy it with .*torch_export"),
        (bf.Bottleneck(4, 2, residual=True), {}, ValueError, "model: .* residual Bottleneck.*torch_export"),
        (nn.Sequential(hooked()), {}, ValueError, "model.0: expected a layer without forward hooks"),
        ("model", {}, TypeError, "model: expected a torch.nn.Module, got str"),
        (
            nn.Linear(4, 4),
            {"format": "pickle"},
            ValueError,
            "format: expected one of safetensors, state, onnx, torch_export",
        ),
        (nn.Linear(4, 4), {"format": "torch_export"}, TypeError, "example: expected an input of the model"),
        (
            nn.Linear(4, 4),
            {"format": "torch_export", "example": torch.ones(1, 4)},
            ValueError,
            r"at least two rows, got shapes \[\[1, 4\]\]",
        ),
    ],
)
def test_what_cannot_be_deployed_is_named(tmp_path, model, options, error, message):
    with pytest.raises(error, match=message) as caught:
        bf.deploy(model, tmp_path / "model", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package onnx: pip install 'byol_fast\[onnx\]'"):
        bf.deploy(nn.Linear(4, 4), tmp_path / "model.onnx", format="onnx", example=torch.ones(2, 4))


def rewritten(path, change):
    """The same file with another description, its own digest left as it was or made anew by ``change``."""
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["byol_fast"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(description, tensors)
    from safetensors.torch import save_file

    save_file(tensors, path, {"byol_fast": json.dumps(description)})


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_activation(description, tensors):
    description["module"]["children"]["2"]["class"] = "Tanh"


def other_version(description, tensors):
    description["version"] = 2


def unknown_layer(description, tensors):
    description["module"]["children"]["2"]["class"] = "Module"
    description["sha256"] = plain.digest(description["module"], description["tensors"])


def other_tensor(description, tensors):
    tensors["3.bias"] += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (functools.partial(cut, count=1), r"expected a model deployed by byol_fast of \d+ bytes, found \d+ bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), r"found 50 bytes that are not one, or are cut short"),
        (lambda path: path.write_bytes(b""), "found 0 bytes that are not one, or are cut short"),
        (lambda path: path.write_text("hello"), "found 5 bytes that are not one"),
        (flip_last_bit, r"with sha256 \w+… for \S+, found \w+…"),
        (lambda path: rewritten(path, other_tensor), r"with sha256 \w+… for 3.bias, found \w+…"),
        (lambda path: rewritten(path, other_activation), "the sha256 it names, found an altered one"),
        (lambda path: rewritten(path, other_version), "format version 1, found version 2"),
        (lambda path: rewritten(path, unknown_layer), "expected layers of torch.nn .*, found 'Module'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    path = tmp_path / "model.safetensors"
    bf.deploy(classifier(), path)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        bf.load(path)
    assert str(caught.value).startswith(f"{path}: expected")
    assert "\n" not in str(caught.value)


def test_a_cut_torch_export_file_is_named(digits, tmp_path):
    path = tmp_path / "model.pt2"
    bf.deploy(classifier(), path, format="torch_export", example=digits[0][:2])
    cut(path, 1000)
    with pytest.raises(
        ValueError, match=r"expected a torch.export file, found \d+ bytes that are not one, or are cut short"
    ):
        bf.load(path)


def test_an_altered_torch_export_file_is_named(digits, tmp_path):
    path = tmp_path / "model.pt2"
    model = classifier()
    bf.deploy(model, path, format="torch_export", example=digits[0][:2])
    weights = model[3].weight.detach().numpy().tobytes()
    content = path.read_bytes()
    assert content.count(weights) == 1
    path.write_bytes(content.replace(weights, weights[:-1] + bytes([weights[-1] ^ 1])))
    with pytest.raises(ValueError, match=r"expected a torch.export file as it was written, found \S+ altered"):
        bf.load(path)


def test_a_missing_file_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        bf.load(tmp_path / "model.safetensors")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    bf.deploy(classifier(), path)
    before = path.read_bytes()

    def full(tensors, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(OSError, match="No space left"):
        bf.deploy(classifier(bias=False), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
