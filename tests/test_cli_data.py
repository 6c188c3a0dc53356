"""pretrain, curve, encode and decode on files of every format: what they write, print, and say of mistakes."""

from __future__ import annotations

import csv
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import byol_fast as bf
from byol_fast import cli
from byol_fast.data import SUFFIXES, read_matrix, write_matrix

DIGITS = torch.from_numpy(load_digits().data)[:600]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with ``digits.npy`` in it."""
    monkeypatch.chdir(tmp_path)
    np.save("digits.npy", DIGITS.numpy())
    return tmp_path


def run(capsys, *arguments):
    """Exit status, standard output, standard error."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def succeed(capsys, *arguments):
    status, output, errors = run(capsys, *arguments)
    assert status == 0, errors
    return output


def facts(output):
    return dict(re.findall(r"^(\w[\w ]*?) {2,}(.*)$", output, re.M))


def in_fresh_process(arguments, **options):
    # The working folder is another than that of the package under test.
    environment = {**os.environ, "PYTHONPATH": str(Path(bf.__file__).parents[1])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


# --------------------------------------------------------------------------------------------------------- pretrain


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_any_format_is_solved_exactly(folder, capsys, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    write_matrix(f"rows{suffix}", DIGITS.split(100), (600, 64), torch.float64)
    told = facts(succeed(capsys, "pretrain", f"rows{suffix}", "--rank", 8))
    pca = bf.StreamingPCA(64).partial_fit(DIGITS)
    assert told["data"] == f"rows{suffix}, 600 × 64, float64"
    assert told["method"] == "exact, on 1 process"
    assert told["yield"] == f"{pca.curve().yield_at(8):.4%}"
    assert told["certificate"].startswith("1.000000 ")
    assert re.fullmatch(r"600 rows in [\d.]+ s: [\d,]+ rows/s, [\d,.]+ MB/s", told["speed"])
    model = bf.load(told["model"])
    assert model.encoder.weight.dtype == torch.float64
    loss = float(torch.nn.functional.mse_loss(model(DIGITS), DIGITS))
    assert loss == pytest.approx(pca.curve().error_at(8), rel=1e-9)


@pytest.mark.parametrize("method", ["alternate", "joint"])
def test_what_was_trained_by_steps_is_in_principal_order_too(folder, capsys, method):
    arguments = ("--method", method, "--epochs", 30, "--lr", 0.01, "--history", "history.csv")
    told = facts(succeed(capsys, "pretrain", "digits.npy", "--rank", 6, *arguments))
    succeed(capsys, "encode", "bottleneck.safetensors", "digits.npy", "-o", "codes.npy")
    codes = np.load("codes.npy")
    covariance = np.cov(codes.T)
    # Uncorrelated; how much of the output each number carries is the size of its column in the decoder times its own.
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-8 * covariance.max())
    decoder = bf.load("bottleneck.safetensors").decoder.weight.numpy()
    carried = np.square(decoder).sum(0) * np.diag(covariance)
    assert (np.diff(carried) < 0).all()
    with open("history.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in table] == list(range(1, 31))
    assert f"{float(table[-1]['certificate']):.6f}" == told["certificate"].split()[0]
    assert not list(folder.glob("*.checkpoint.pt"))


def test_a_nonlinear_bottleneck_is_trained_from_the_linear_optimum(folder, capsys):
    arguments = ("--activation", "relu", "--epochs", 2, "--dtype", "float32", "--no-bias")
    told = facts(succeed(capsys, "pretrain", "digits.npy", "--rank", 4, *arguments))
    assert told["method"] == "joint, on 1 process"
    assert told["speed"].startswith("600 rows × 3 in ")
    assert "certificate" not in told
    model = bf.load("bottleneck.safetensors")
    assert [name for name, _ in model.named_children()] == ["encoder", "activation", "decoder"]
    assert (model.encoder.bias, model.encoder.weight.dtype) == (None, torch.float32)


def test_ctrl_c_leaves_a_checkpoint_and_resume_ends_where_one_run_does(folder, capsys, monkeypatch):
    arguments = ("pretrain", "digits.npy", "--rank", 4, "--method", "joint", "--epochs", 6, "--batch-size", 100)
    succeed(capsys, *arguments, "-o", "whole.safetensors")
    loss, calls = bf.Bottleneck.reconstruction_loss, []

    def impatient(self, *tensors):
        calls.append(tensors)
        if len(calls) == 15:
            signal.raise_signal(signal.SIGINT)
        return loss(self, *tensors)

    monkeypatch.setattr(bf.Bottleneck, "reconstruction_loss", impatient)
    status, output, errors = run(capsys, *arguments, "-o", "broken.safetensors")
    assert (status, output) == (130, "")
    assert errors.splitlines()[-2:] == [
        "byol-fast: checkpoint in broken.checkpoint.pt; the same command with --resume goes on",
        "byol-fast: interrupted",
    ]
    assert not Path("broken.safetensors").exists()
    succeed(capsys, *arguments, "-o", "broken.safetensors", "--resume")
    assert len(calls) == 36
    # That training resumes bit-equal is tested with the checkpoints; here, the file is in principal order besides.
    broken, whole = (bf.load(f"{name}.safetensors").state_dict() for name in ("broken", "whole"))
    for name, value in whole.items():
        torch.testing.assert_close(broken[name], value, rtol=1e-9, atol=1e-12)
    assert not Path("broken.checkpoint.pt").exists()


def test_torchrun_gives_what_one_process_gives(folder, capsys):
    arguments = ("pretrain", "digits.npy", "--rank", "5", "--method", "joint", "--epochs", "3")
    succeed(capsys, *arguments, "-o", "one.safetensors")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "byol_fast")
    done = in_fresh_process([*launch, *arguments, "-o", "two.safetensors"])
    assert done.returncode == 0, done.stderr
    assert facts(done.stdout)["method"] == "joint, on 2 processes"
    assert done.stdout.count("model ") == 1
    one, two = (bf.load(f"{name}.safetensors").state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.skipif(sys.platform != "linux", reason="what counts against the limit is Linux's")
def test_memory_does_not_grow_with_the_file(folder):
    """A file of 1 GB, where 0.8 GB of memory are allowed; its zeros take no room on the disk."""
    with open("large.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (4_000_000, 64)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(DIGITS.float().numpy().tobytes())
        file.truncate(file.tell() - 600 * 256 + 4_000_000 * 256)

    def limited(*arguments):
        limit = 3 << 28
        return in_fresh_process(
            ["-m", "byol_fast", *arguments], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        )

    done = limited("pretrain", "large.npy", "--rank", "3")
    assert done.returncode == 0, done.stderr
    done = limited("encode", "bottleneck.safetensors", "large.npy", "-o", "codes.npy")
    assert done.returncode == 0, done.stderr
    assert np.load("codes.npy", mmap_mode="r").shape == (4_000_000, 3)


# ------------------------------------------------------------------------------------------------------------ curve


def test_curve_prints_the_table_and_writes_figure_and_csv(folder, capsys):
    output = succeed(capsys, "curve", "digits.npy", "--ranks", "2,16", "--csv", "all.csv")
    curve = bf.StreamingPCA(64).partial_fit(DIGITS).curve()
    lines = output.splitlines()
    assert lines[0].split() == ["rank", "yield", "error", "ratio", "bytes"]
    for line, rank in zip(lines[1:3], (2, 16), strict=True):
        cells = [str(rank), f"{curve.yield_at(rank):.4%}", f"{curve.error_at(rank):.6g}"]
        assert line.split() == [*cells, f"{64 / rank:.2f}", str(4 * rank)]
    assert repr(curve) in lines
    assert any(re.fullmatch(r"600 rows in [\d.]+ s: [\d,]+ rows/s, [\d,.]+ MB/s", line) for line in lines)
    assert Path("curve.png").stat().st_size > 1000
    assert len(Path("all.csv").read_text().splitlines()) == 65


def test_curve_shows_round_ranks_and_those_of_round_yields(folder, capsys):
    output = succeed(capsys, "curve", "digits.npy", "--figure", "mine.svg")
    curve = bf.StreamingPCA(64).partial_fit(DIGITS).curve()
    shown = {int(line.split()[0]) for line in output.split("\n\n")[0].splitlines()[1:]}
    assert shown >= {1, 2, 4, 8, 16, 32, 64, curve.rank_for(energy=0.9), curve.rank_for(energy=0.99)}
    assert Path("mine.svg").exists()


def test_curve_of_many_features_takes_two_passes(folder, capsys):
    wide = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0))
    wide[:, :3] *= 100
    np.save("wide.npy", wide.numpy())
    output = succeed(capsys, "curve", "wide.npy", "--rank", 3, "--ranks", "3")
    exact = torch.linalg.svdvals(wide.double() - wide.double().mean(0)).square()
    kept = float(output.splitlines()[1].split()[1].rstrip("%")) / 100
    assert kept == pytest.approx(float(exact[:3].sum() / exact.sum()), rel=1e-3)
    assert "300 rows × 2 in " in output


def test_curve_without_matplotlib_says_so(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    output = succeed(capsys, "curve", "digits.npy")
    assert output.endswith("no figure: it needs matplotlib: pip install 'byol_fast[plot]'\n")


# ------------------------------------------------------------------------------------------------------------ codes


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_codes_and_rows_in_every_format_are_the_models(folder, capsys, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    succeed(capsys, "pretrain", "digits.npy", "--rank", 7)
    encoded = succeed(capsys, "encode", "bottleneck.safetensors", "digits.npy", "-o", f"codes{suffix}")
    assert re.match(r"600 rows in [\d.]+ s: [\d,]+ rows/s, [\d,.]+ MB/s\ncodes: ", encoded)
    succeed(capsys, "decode", "bottleneck.safetensors", f"codes{suffix}", "-o", f"rows{suffix}")
    model = bf.load("bottleneck.safetensors")
    torch.testing.assert_close(read_matrix(f"codes{suffix}"), model.encoder(DIGITS), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(read_matrix(f"rows{suffix}"), model(DIGITS), rtol=1e-12, atol=1e-12)


def test_codes_are_nested_and_each_rank_is_the_best(folder, capsys):
    succeed(capsys, "pretrain", "digits.npy", "--rank", 10)
    succeed(capsys, "encode", "bottleneck.safetensors", "digits.npy", "-o", "all.npy")
    succeed(capsys, "encode", "bottleneck.safetensors", "digits.npy", "-o", "few.npy", "--rank", 3)
    few = np.load("few.npy")
    np.testing.assert_allclose(few, np.load("all.npy")[:, :3], rtol=1e-12, atol=1e-12)
    succeed(capsys, "decode", "bottleneck.safetensors", "few.npy", "-o", "rows.npy")
    error = np.square(np.load("rows.npy") - DIGITS.numpy()).mean()
    assert error == pytest.approx(bf.StreamingPCA(64).partial_fit(DIGITS).curve().error_at(3), rel=1e-9)


def test_codes_behind_an_activation_are_whole(folder, capsys):
    succeed(capsys, "pretrain", "digits.npy", "--rank", 5, "--activation", "gelu", "--epochs", 1)
    succeed(capsys, "encode", "bottleneck.safetensors", "digits.npy", "-o", "codes.npy")
    succeed(capsys, "decode", "bottleneck.safetensors", "codes.npy", "-o", "rows.npy")
    torch.testing.assert_close(
        torch.from_numpy(np.load("rows.npy")), bf.load("bottleneck.safetensors")(DIGITS), rtol=1e-12, atol=1e-12
    )
    status, _, errors = run(capsys, "encode", "bottleneck.safetensors", "digits.npy", "-o", "codes.npy", "--rank", 2)
    assert status == 2
    assert errors == "byol-fast: --rank: expected 5, because codes behind GELU are not nested, got 2\n"


# ----------------------------------------------------------------------------------------------------------- errors


def with_nan():
    rows = DIGITS.clone()
    rows[321, 7] = float("nan")
    np.save("nan.npy", rows.numpy())


def prepare():
    with_nan()
    np.save("narrow.npy", DIGITS[:, :9].numpy())
    np.save("none.npy", DIGITS[:0].numpy())
    pca = bf.StreamingPCA(64).partial_fit(DIGITS)
    bf.deploy(pca.to_bottleneck(4, dtype=torch.float64), "model.safetensors")
    bf.deploy(torch.nn.Linear(64, 4), "linear.safetensors")


MISTAKES = {
    "pretrain absent.npy --rank 3": "absent.npy: expected a .npy file, found nothing",
    "pretrain digits.npy --rank 65": "--rank: expected 1 ≤ rank ≤ columns of digits.npy = 64, got 65",
    "pretrain digits.npy --rank 3 -o model.pt": "model.pt: expected a .safetensors file in an existing folder",
    "pretrain digits.npy --rank 3 --name x": "digits.npy: expected a file with named arrays for the name 'x', found",
    "pretrain digits.npy --rank 3 --method fast": "method: expected one of auto, exact, alternate, joint, got 'fast'",
    "pretrain digits.npy --rank 3 --activation sine": "activation: expected one of",
    "pretrain digits.npy --rank 3 --validation 2": "validation: expected a share that leaves rows on both sides",
    "pretrain nan.npy --rank 3": "batch: expected finite numbers, got NaN or Inf in row 321 (row 321 of all rows seen)",
    "pretrain none.npy --rank 3": "data: expected at least one row, got shape [0, 64]",
    "curve nan.npy": "batch: expected finite numbers, got NaN or Inf in row 321 (row 321 of all rows seen)",
    "curve none.npy": "none.npy: expected at least one row, found shape [0, 64]",
    "curve digits.npy --ranks 70": "rank: expected 1 ≤ rank ≤ the curve's last rank = 64, got 70",
    "encode digits.npy digits.npy -o c.npy": "digits.npy: expected a model deployed by byol_fast, found",
    "encode linear.safetensors digits.npy -o c.npy": "linear.safetensors: expected a deployed bottleneck, found a",
    "encode model.safetensors narrow.npy -o c.npy": "narrow.npy: expected 64 columns, as model.safetensors was",
    "encode model.safetensors digits.npy -o c.csv": "c.csv: expected a file ending in .npy, .npz, .pt, .safetensors",
    "encode model.safetensors digits.npy -o no/c.npy": "no/c.npy: expected an existing folder, found no no",
    "encode model.safetensors digits.npy -o c.npy --rank 5": "--rank: expected 1 ≤ rank ≤ the model's rank = 4, got 5",
    "decode model.safetensors narrow.npy -o r.npy": "narrow.npy: expected 1 ≤ rank ≤ the model's rank = 4, got 9",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(folder, capsys, command):
    prepare()
    before = sorted(folder.iterdir())
    status, output, errors = run(capsys, *command.split())
    assert (status, output) == (2, "")
    assert errors.startswith(f"byol-fast: {MISTAKES[command]}")
    assert errors.count("\n") == 1
    assert sorted(folder.iterdir()) == before
