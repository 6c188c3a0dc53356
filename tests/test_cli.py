"""The command line: what info says, and that every mistake is one line and an exit status."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import byol_fast as bf
from byol_fast import cli
from byol_fast.backends import BackendStatus, verified


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def in_fresh_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "byol_fast", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def facts(output: str) -> dict[str, str]:
    return {name.strip(): value for name, _, value in (line.partition("  ") for line in output.splitlines())}


def test_info_tells_versions_backends_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = run(capsys, "info")
    assert (status, errors) == (0, "")
    told = {name: value.strip() for name, value in facts(output).items()}
    assert told["byol_fast"] == bf.__version__
    assert told["torch"] == torch.__version__
    assert told["numpy"] == np.__version__
    assert told["python"].startswith(platform.python_version())
    assert told["threads"] == str(torch.get_num_threads())
    for name, backend in bf.backends().items():
        assert told[f"{name} backend"].startswith(str(backend))


def test_info_tells_that_kernels_are_unverified(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {name: BackendStatus(True) for name in ("gram", "cuda")}
    monkeypatch.setattr(cli.info, "backends", lambda: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verified, "architecture", lambda device: "sm_0")
    told = facts(run(capsys, "info")[1])
    assert told["cuda backend"].strip() == "available, unverified on sm_0: only use_backend('cuda') runs it"
    assert told["gram backend"].strip() == "available"


@pytest.mark.skipif(not bf.backends()["native"].available, reason="there is no native core in this installation")
def test_info_tells_about_the_native_core(capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = run(capsys, "info")
    assert {"instruction set", "thread pool", "compiler"} <= set(facts(output))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"byol_fast {bf.__version__}\n", "")


def test_python_dash_m_is_the_same_command() -> None:
    done = in_fresh_process("--version")
    assert (done.returncode, done.stdout) == (0, f"byol_fast {bf.__version__}\n")


@pytest.mark.parametrize("ranks", ["0", "8,-1", "eight", "", "8,,16"])
def test_ranks_that_are_none(capsys: pytest.CaptureFixture[str], ranks: str) -> None:
    status, _, errors = run(capsys, "demo", "--ranks", ranks)
    assert status == 2
    last = errors.splitlines()[-1]
    assert last.endswith(f"argument --ranks: expected ranks ≥ 1 separated by commas, got {ranks!r}")


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = run(capsys)
    assert status == 2
    assert "COMMAND" in errors


@pytest.mark.parametrize(
    "error",
    [
        ValueError("rank: expected\n  an integer ≥ 1, got 0"),
        TypeError("data: expected a matrix"),
        FileNotFoundError(2, "No such file or directory", "rows.npy"),
        bf.BackendError("use_backend: backend 'cuda' cannot run here"),
        ModuleNotFoundError("plot needs matplotlib"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr(cli.info, "run", fail)
    status, output, errors = run(capsys, "info")
    assert (status, output) == (2, "")
    assert errors == f"byol-fast: {' '.join(str(error).split())}\n"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(cli.info, "run", fail)
    with pytest.raises(AssertionError):
        cli.main(["info"])


def test_ctrl_c_ends_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(cli.info, "run", lambda options: signal.raise_signal(signal.SIGINT))
    # A shell starts its background jobs with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert run(capsys, "info") == (130, "", "byol-fast: interrupted\n")


def test_a_reader_that_stops_reading_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "byol_fast", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=120)
    process.stderr.close()
    assert "Traceback" not in errors
