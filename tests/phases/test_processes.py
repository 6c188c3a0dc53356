"""Two gloo processes compute what one does; a lost process is an error that leaves the checkpoint whole."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import byol_fast as bf

WORKER = Path(__file__).with_name("worker.py")
spec = importlib.util.spec_from_file_location("worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


def launch(name, folder, size=2):
    """Exit codes, standard errors and results by rank."""
    commands = [[sys.executable, str(WORKER), name, str(folder), str(rank), str(size)] for rank in range(size)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    files = [folder / f"{name}-{rank}.pt" for rank in range(size)]
    results = [torch.load(file) if file.exists() else None for file in files]
    return [process.returncode for process in processes], errors, results


def launched(name, folder):
    codes, errors, results = launch(name, folder)
    assert codes == [0, 0], errors
    return results


def assert_same(found, expected):
    """To the accuracy contract for float64 sums, which the order of the rows changes."""
    for name, value in expected["state"].items():
        assert float((found["state"][name] - value).norm()) <= 1e-9 * max(float(value.norm()), 1e-3), name
    assert len(found["table"]) == len(expected["table"])
    for row, reference in zip(found["table"], expected["table"], strict=True):
        assert row == pytest.approx(reference, rel=1e-8)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launched("same", tmp_path_factory.mktemp("same"))


@pytest.mark.parametrize("name", worker.scenarios(Path()))
def test_two_processes_compute_what_one_does(two, tmp_path, name):
    expected = worker.scenarios(tmp_path)[name]()
    for found in two:
        assert_same(found[name], expected)


def test_both_processes_have_the_same_bits(two):
    for name, found in two[0].items():
        other = two[1][name]["state"]
        assert all(torch.equal(value, other[key]) for key, value in found["state"].items()), name


def test_processes_with_batches_of_their_own_may_have_fewer_or_none(tmp_path):
    results = launched("loaders", tmp_path)
    for found in results:
        assert_same(found["exact"], worker.trained(worker.ROWS[:350]))
        assert_same(found["exact, one has no rows"], worker.trained(worker.ROWS[:300]))
        assert found["error"] == "data: expected at least one batch in every process, got none in one of them"
        # Six steps of 100, 50, 50, … rows: the second process has one batch, the first goes on alone.
        losses = [row["loss"] for row in found["uneven"]["table"]]
        assert losses == sorted(losses, reverse=True)
    assert torch.equal(*(found["uneven"]["state"]["encoder.weight"] for found in results))


def test_models_in_ddp_and_fsdp_are_taken_as_they_are(tmp_path):
    results = launched("wrapped", tmp_path)
    finetuned = worker.finetuned(worker.classifier())
    trained = worker.trained(module=worker.deep(), **worker.joint)
    for found in results:
        assert_same(found["ddp"], finetuned)
        assert_same(found["fsdp"], finetuned)
        assert_same(found["fsdp, any module"], trained)
        assert_same(found["fsdp, resumed"], trained)
    # One file, whole, with the names and shapes that one process uses.
    plain = worker.classifier()
    plain.load_state_dict(torch.load(tmp_path / "fsdp.pt")["model"])
    assert_same({"state": plain.state_dict(), "table": []}, {**finetuned, "table": []})


def test_a_process_that_dies_is_an_error_and_the_checkpoint_is_whole(tmp_path):
    codes, errors, _ = launch("dies", tmp_path)
    assert codes[1] == 9
    assert codes[0] not in (0, 9)
    assert "RuntimeError: process 0 of 2 lost the others; one of them has ended (" in errors[0]
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert len(state["history"]) == 2
    bf.Bottleneck(64, 6).load_state_dict(state["model"])


def test_torchrun_starts_processes_that_find_each_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, byol_fast as bf\n"
        "from byol_fast.phases import processes\n"
        "with processes.launched():\n"
        "    layer = bf.Bottleneck(8, 2)\n"
        "    bf.pretrain(layer, torch.arange(240.0).sin().reshape(30, 8), checkpoint=sys.argv[1])\n"
        # In one piece: the processes write to one pipe.
        "    sys.stdout.write(f'processes {processes.size()}\\n')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*command, str(script), str(tmp_path / "run.pt")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("processes 2") == 2
    assert torch.load(tmp_path / "run.pt")["phase"]["processes"] == 2


def test_ctrl_c_in_one_process_stops_all_at_the_same_step(tmp_path):
    assert launched("interrupted", tmp_path) == ["interrupted", "interrupted"]
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert (len(state["history"]), state["step"]) in [(1, 4), (1, 5)]
