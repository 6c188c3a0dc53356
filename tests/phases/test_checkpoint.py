"""Checkpoints: a resumed run is bit-equal, Ctrl-C and failed writes leave a usable file, damage is named."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import byol_fast as bf
from byol_fast import files

adam = functools.partial(torch.optim.Adam, lr=3e-3)
cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6)


class Stop(Exception):
    """Ends a run from within, at a step of our choosing."""


class Fragile(bf.Bottleneck):
    """Fails at a given call of its loss; has dropout, to need torch's generator."""

    fail_at = None

    def reconstruction_loss(self, input, target=None, reduction="mean"):
        if self.fail_at == 0:
            raise Stop
        if self.fail_at is not None:
            self.fail_at -= 1
        return super().reconstruction_loss(nn.functional.dropout(input, 0.1, self.training), input, reduction)


def made(fail_at=None):
    torch.manual_seed(0)
    layer = Fragile(64, 6, activation="gelu")
    layer.fail_at = fail_at
    return layer


def table(result):
    """The history, but for the time, which no run repeats."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


def loader_of(rows, **options):
    return DataLoader(TensorDataset(rows), batch_size=200, shuffle=True, **options)


@pytest.mark.parametrize("method", ["joint", "alternate"])
@pytest.mark.parametrize("fail_at", [5, 18, 33])
@pytest.mark.parametrize("form", ["tensor", "loader", "loader with a generator"])
def test_a_resumed_run_is_bit_equal_to_one_that_was_never_stopped(digits, tmp_path, method, fail_at, form):
    rows, _ = digits

    def run(fail_at=None, **options):
        data = rows
        if form != "tensor":
            data = loader_of(rows, **({} if form == "loader" else {"generator": torch.Generator()}))
        layer = made(fail_at)
        result = bf.pretrain(
            layer,
            data,
            method=method,
            epochs=4,
            batch_size=200,
            optimizer=adam,
            scheduler=cosine,
            warm_start=False,
            patience=50,
            checkpoint_every=2,
            **options,
        )
        return layer.state_dict(), result

    expected, whole = run(checkpoint=tmp_path / "whole.pt")
    with pytest.raises(Stop):
        run(fail_at, checkpoint=tmp_path / "broken.pt")
    found, resumed = run(checkpoint=tmp_path / "broken.pt", resume=True)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert table(whole) == table(resumed)


def test_alternating_exact_half_steps_resume(digits, tmp_path):
    rows, _ = digits

    def run(epochs, **options):
        torch.manual_seed(0)
        layer = bf.Bottleneck(64, 6)
        return layer, bf.pretrain(layer, rows, method="alternate", epochs=epochs, **options)

    expected, whole = run(7)
    run(3, checkpoint=tmp_path / "run.pt")
    found, resumed = run(7, checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.equal(expected.encoder.weight, found.encoder.weight)
    assert table(whole) == table(resumed)


def test_finetuning_resumes_with_dropout_and_a_model_that_starts_elsewhere(digits, tmp_path):
    def run(epochs, seed, **options):
        torch.manual_seed(seed)
        model = nn.Sequential(bf.Bottleneck(64, 10), nn.Dropout(0.3), nn.BatchNorm1d(64), nn.Linear(64, 10))
        bf.finetune(model, digits, loss=nn.functional.cross_entropy, epochs=epochs, optimizer=adam, **options)
        return model.state_dict()

    expected = run(4, 0)
    run(2, 0, checkpoint=tmp_path / "run.pt")
    found = run(4, 1, checkpoint=tmp_path / "run.pt", resume=True)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_serves_without_this_package(digits, tmp_path):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6)
    bf.pretrain(layer, rows, checkpoint=tmp_path / "run.pt")
    plain = nn.ModuleDict({"encoder": nn.Linear(64, 6), "decoder": nn.Linear(6, 64)})
    plain.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True)["model"])
    assert torch.equal(plain["encoder"].weight, layer.encoder.weight)


def test_resuming_without_a_checkpoint_starts_and_resuming_a_finished_run_returns_it(digits, tmp_path):
    rows, _ = digits
    results = [
        bf.pretrain(made(), rows, epochs=2, checkpoint=tmp_path / "run.pt", resume=True, warm_start=False)
        for _ in range(2)
    ]
    assert results[0].history == results[1].history
    assert torch.equal(results[0].module.encoder.weight, results[1].module.encoder.weight)


# -------------------------------------------------------------------------------------- interruptions and failures

SLOW = """
import sys, time, torch, byol_fast as bf
class Slow(bf.Bottleneck):
    def reconstruction_loss(self, *args):
        time.sleep(0.02)
        return super().reconstruction_loss(*args)
torch.manual_seed(0)
layer = Slow(64, 6, activation="relu")
try:
    bf.pretrain(layer, torch.rand(400, 64), epochs=10_000, batch_size=100, checkpoint=sys.argv[1])
except KeyboardInterrupt:
    found = torch.load(sys.argv[1], weights_only=True)
    same = torch.equal(found["model"]["encoder.weight"], layer.encoder.weight)
    print("interrupted", same, len(found["history"]) * 4 + found["step"])
    sys.exit(130)
"""


def test_ctrl_c_leaves_a_usable_checkpoint_of_the_last_step(tmp_path):
    path = tmp_path / "run.pt"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(path)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    word, same, steps = output.split()
    assert (word, same) == ("interrupted", "True")
    assert int(steps) >= 4


def test_a_kill_while_checkpoints_are_written_leaves_a_whole_one(tmp_path):
    path = tmp_path / "run.pt"
    code = SLOW.replace("0.02", "0").replace("checkpoint=", "checkpoint_every=1, checkpoint=")
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    process.wait()
    state = torch.load(path, weights_only=True)
    assert torch.isfinite(state["model"]["encoder.weight"]).all()


def test_a_failed_write_keeps_the_old_checkpoint_and_leaves_nothing_behind(digits, tmp_path, monkeypatch):
    rows, _ = digits
    path = tmp_path / "run.pt"
    bf.pretrain(made(), rows, epochs=1, checkpoint=path)
    before = path.read_bytes()

    def full(state, file):
        file.write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        bf.pretrain(made(), rows, epochs=1, checkpoint=path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_file_is_replaced_only_when_the_block_succeeds(tmp_path):
    path = tmp_path / "table.json"
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps([1]))
        assert not path.exists()
    with pytest.raises(TypeError), files.replacing(path) as temporary:
        json.dump([2, object()], temporary.open("w"))
    assert path.read_text() == "[1]"
    assert os.listdir(tmp_path) == ["table.json"]


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_from_before(digits, tmp_path):
    rows, _ = digits
    path = tmp_path / "run.pt"
    bad = torch.cat((rows, torch.full((1, 64), torch.inf)))
    bf.pretrain(made(), rows, epochs=1, checkpoint=path, warm_start=False)
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match="look for NaN in the data"):
        bf.pretrain(made(), bad, epochs=2, batch_size=None, checkpoint=path, warm_start=False)
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------- what does not fit


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def overwritten(path):
    path.write_text("not a checkpoint")


def something_else(path):
    torch.save({"model": 1}, path)


def another_version(path):
    torch.save({**torch.load(path, weights_only=True), "byol_fast_checkpoint": 99}, path)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (cut, "bytes that are not one"),
        (overwritten, "16 bytes that are not one"),
        (something_else, "a dict of something else"),
        (another_version, "version 99"),
    ],
)
def test_a_damaged_checkpoint_is_named(digits, tmp_path, damage, found):
    rows, _ = digits
    path = tmp_path / "run.pt"
    bf.pretrain(made(), rows, epochs=1, checkpoint=path)
    damage(path)
    with pytest.raises(ValueError) as caught:
        bf.pretrain(made(), rows, checkpoint=path, resume=True)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected a byol_fast checkpoint of version 1, found")
    assert found in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed = 1, found 0"),
        ({"batch_size": 10}, "batch_size = 10, found 1024"),
        ({"method": "alternate"}, "method = 'alternate', found 'joint'"),
        ({"data": slice(100)}, "rows = 100, found 1797"),
        ({"rank": 5}, "of this module and optimiser, found another"),
        ({"optimizer": functools.partial(torch.optim.SGD, lr=1.0), "rank": 5}, "of this module and optimiser"),
    ],
)
def test_a_run_is_not_continued_with_other_arguments(digits, tmp_path, change, message):
    rows, _ = digits
    path = tmp_path / "run.pt"
    options = {"method": "joint", "epochs": 1, "checkpoint": path, "warm_start": False}
    bf.pretrain(bf.Bottleneck(64, 6, activation="relu"), rows, **options)
    layer = bf.Bottleneck(64, change.pop("rank", 6), activation="relu")
    rows = rows[change.pop("data", slice(None))]
    with pytest.raises(ValueError, match=message) as caught:
        bf.pretrain(layer, rows, **{**options, "resume": True, **change})
    assert "\n" not in str(caught.value)
