"""Compressed models in files: the same outputs in a fresh process, with torch alone; and the command for it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from contract import FLOOR, relative_error
from torch import nn

import byol_fast as bf
from byol_fast.cli import main
from byol_fast.compression.exported import with_layers
from byol_fast.phases import plain

OPEN = {"gate": "none", "progress": False}


def network():
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Linear(128, 32)
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), second, nn.ReLU(), nn.Linear(32, 5)).eval()


@pytest.fixture
def compressed():
    images = torch.randn(24, 1, 8, 8)
    model, report = bf.compress(network(), images, keep=0.5, include=["0", "3"], allocation="uniform", **OPEN)
    assert len(report.replaced) == 2
    return model, images


def test_a_compressed_network_runs_in_a_fresh_process_with_torch_alone(compressed, tmp_path):
    model, images = compressed
    bf.deploy(model, tmp_path / "model.safetensors")
    torch.save(images, tmp_path / "images.pt")
    shutil.copy(plain.__file__, tmp_path)
    code = (
        "import sys; sys.path[0:0] = ['.']; import torch; from plain import load; model = load('model.safetensors'); "
    )
    code += "assert 'byol_fast' not in sys.modules; torch.save(model(torch.load('images.pt')), 'out.pt')"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    assert relative_error(torch.load(tmp_path / "out.pt"), model(images).double().detach()) < 2e-6


def test_a_compressed_network_runs_in_onnxruntime_and_as_an_exported_program(compressed, tmp_path):
    import onnxruntime

    model, images = compressed
    expected = model(images).double().detach()
    bf.deploy(model, tmp_path / "model.onnx", format="onnx", example=images[:2])
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    assert relative_error(torch.from_numpy(found), expected) < 2e-5
    bf.deploy(model, tmp_path / "model.pt2", format="torch_export", example=images[:2])
    assert relative_error(bf.load(tmp_path / "model.pt2")(images).detach(), expected) < 2e-6


class Architecture(nn.Module):
    """What no tree of layers can describe."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.layer = nn.Linear(16, 16)
        self.again = self.layer

    def forward(self, entries):
        return self.again(torch.relu(self.layer(self.table(entries)))).sum(1)


def test_a_model_that_is_code_loads_into_its_architecture(tmp_path):
    entries = torch.randint(0, 30, (12, 4))
    model, report = bf.compress(Architecture(), entries, keep=0.6, allocation="uniform", **OPEN)
    assert len(report.replaced) == 2
    bf.deploy(model, tmp_path / "model.safetensors", format="state")
    loaded = bf.load(tmp_path / "model.safetensors", Architecture())
    assert {type(module) for module in loaded.modules()} == {Architecture, nn.Sequential, nn.Linear, nn.Embedding}
    assert loaded.layer is loaded.again
    assert torch.equal(loaded(entries), model.eval()(entries))
    assert isinstance(model.layer, bf.Bottleneck)
    with pytest.raises(ValueError, match="expected model=… with it, the model before compression, got NoneType"):
        bf.load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected a model with a module table, got Linear"):
        bf.load(tmp_path / "model.safetensors", nn.Linear(2, 2))
    with pytest.raises(ValueError, match='got one; use format="safetensors"'):
        bf.deploy(bf.Bottleneck(8, 2), tmp_path / "other.safetensors", format="state")


def sequences():
    """A transformer with its attention's projections replaced, and inputs of it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    rows = torch.randn(12, 6, 16)
    model, report = bf.compress(nn.TransformerEncoder(layer, 2).eval(), rows, allocation="uniform", **OPEN)
    assert sum("self_attn" in layer.name for layer in report.replaced) == 8
    return model, rows


_IN_ONNXRUNTIME = """
import numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
numpy.save("out.npy", session.run(None, {session.get_inputs()[0].name: numpy.load("rows.npy")})[0])
"""
_WITH_TORCH_ALONE = """
import numpy, sys, torch
output = torch.export.load("model.pt2").module()(torch.from_numpy(numpy.load("rows.npy")))
assert "byol_fast" not in sys.modules
numpy.save("out.npy", output.detach().numpy())
"""


@pytest.mark.parametrize(
    ("format", "file", "code"),
    [("onnx", "model.onnx", _IN_ONNXRUNTIME), ("torch_export", "model.pt2", _WITH_TORCH_ALONE)],
)
def test_replaced_attention_runs_in_a_fresh_process(tmp_path, format, file, code):
    model, rows = sequences()
    bf.deploy(model, tmp_path / file, format=format, example=rows[:2])
    np.save(tmp_path / "rows.npy", rows.numpy())
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert relative_error(found, model(rows).double().detach()) < FLOOR[torch.float32]


@pytest.mark.parametrize("format", ["state", "safetensors"])
def test_replaced_attention_is_no_tree_of_plain_layers(tmp_path, format):
    model, _ = sequences()
    with pytest.raises(ValueError, match='deploy it with format="torch_export"') as caught:
        bf.deploy(model, tmp_path / "model.safetensors", format=format)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_exported_program_has_its_layers_back():
    images = torch.randn(6, 1, 8, 8)
    model = network()
    rows = {0: torch.export.Dim.DYNAMIC}
    found = with_layers(torch.export.export(model, (images,), dynamic_shapes=(rows,)))
    assert type(found.get_submodule("3")) is nn.Linear
    assert type(found.get_submodule("0")) is nn.Conv2d
    assert torch.equal(found(images), model(images))
    table = nn.Sequential(nn.Embedding(9, 4, padding_idx=1), nn.Linear(4, 2, bias=False))
    entries = torch.arange(9)
    again = with_layers(torch.export.export(table, (entries,)))
    assert type(again.get_submodule("0")) is nn.Embedding
    assert torch.equal(again(entries), table(entries))


def test_the_command_compresses_an_exported_program(tmp_path, capsys):
    model, images = network(), torch.randn(24, 1, 8, 8)
    bf.deploy(model, tmp_path / "model.pt2", format="torch_export", example=images[:2])
    torch.save(images.flatten(1), tmp_path / "rows.pt")
    arguments = ["--calibration", str(tmp_path / "rows.pt"), "-o", str(tmp_path / "small.pt2"), "--gate", "none"]
    assert main(["compress", str(tmp_path / "model.pt2"), *arguments, "--keep", "0.5", "--batch-size", "8"]) == 0
    assert "layers are bottlenecks" in capsys.readouterr().out
    report = json.loads((tmp_path / "small.pt2.report.json").read_text())
    assert report["kept"] <= 0.5
    small = bf.load(tmp_path / "small.pt2")
    assert sum(tensor.numel() for tensor in small.state_dict().values()) < 3000
    found = relative_error(small(images).detach(), model(images).double().detach())
    assert found == pytest.approx(report["error"], rel=1e-3)


def test_the_command_compresses_a_folder_of_transformers(tmp_path, capsys):
    from transformers import AutoConfig, AutoModel, BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    words = [f"w{i}" for i in range(40)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    folder, texts = tmp_path / "bert", tmp_path / "texts.txt"
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    sizes = {"vocab_size": 45, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32)).save_pretrained(folder)
    texts.write_text("\n".join(" ".join(words[i : i + 5]) for i in range(30)))
    arguments = ["--calibration", str(texts), "-o", str(tmp_path / "out"), "--gate", "none", "--include", "encoder"]
    assert main(["compress", str(folder), *arguments]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] <= 0.5
    architecture = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    loaded = bf.load(tmp_path / "out" / "compressed.safetensors", architecture)
    batch = {"input_ids": torch.randint(0, 45, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    dense = BertModel.from_pretrained(folder).eval()
    found = relative_error(loaded(**batch).last_hidden_state, dense(**batch).last_hidden_state.double().detach())
    assert 0 < found < 0.8


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys):
    (tmp_path / "model.pt2").write_text("hello")
    arguments = ["--calibration", "rows.npy", "-o", str(tmp_path / "out.pt2")]
    assert main(["compress", str(tmp_path / "model.pt2"), *arguments]) == 2
    error = capsys.readouterr().err
    assert "model.pt2: expected a file of torch.export or a folder" in error
    assert error.count("\n") == 1
