"""The benchmark suite: it refuses wrong results, its peers are right, its report tells what the results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import floors, memory, report
from bench.cases import OURS, QUICK, Case
from bench.test_speed import judge

MACHINE = {"device": "a machine", "instruction_set": "avx1024", "peak": {"float32": 1e9, "copy": 1e9}}


@pytest.mark.parametrize(
    "operation", ["step", "tied", "loss", "layer", "layer_backward", "mse", "mse_backward", "sparse"]
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_every_variant_keeps_the_contract(operation: str) -> None:
    """A peer that computes something else would make any comparison with it worthless."""
    case = Case(operation, 96, 200, 0 if operation.startswith("mse") else 12)
    tensors = case.tensors()
    runs = {name: run for name, run in case.variants(tensors).items() if name != "compiled"}
    for name, verdict in judge(runs, case.truth(tensors), case.outputs(tensors)).items():
        assert verdict["refused"] is None, f"{name}: {verdict['refused']}"


@pytest.mark.parametrize("wrong", ["output", "d_encoder_weight", "d_decoder_bias"])
def test_a_wrong_result_is_refused_by_name(wrong: str) -> None:
    case = Case("step", 64, 48, 8)
    tensors = case.tensors()
    runs, names = case.variants(tensors), case.outputs(tensors)

    def spoiled() -> list[torch.Tensor]:
        return [
            result * 1.001 if name == wrong else result for name, result in zip(names, runs["eager"](), strict=True)
        ]

    verdicts = judge({"eager": runs["eager"], OURS: spoiled}, case.truth(tensors), names)
    assert verdicts["eager"]["refused"] is None
    assert verdicts[OURS]["refused"].startswith(f"{wrong}: relative error 1.00e-03")


def test_case_names_are_unique() -> None:
    from bench.cases import CASES

    names = [case.id for case in [*CASES, *QUICK]]
    assert len(names) == len(set(names))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of resident memory")
def test_memory_counts_what_a_call_allocates() -> None:
    """Eager holds the code, the reconstruction and its gradient, and little else."""
    case = Case("step", 8192, 1024, 16, memory=True)
    matrix = 8192 * 1024 * 4
    assert 2 * matrix <= memory.extra_bytes(case.id, "eager") < 3 * matrix


def result(p50: float, **more: object) -> dict[str, object]:
    return {"errors": {"output": 1e-7}, "refused": None, "p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50} | more


def document(**variants: dict[str, object]) -> dict[str, object]:
    """What a run leaves behind, of one case."""
    case = {"operation": "step", "dtype": "float32", "rows": 1000, "features": 100, "rank": 10, "ratio": 1.0}
    return {
        "datetime": "2030-01-02T03:04:05",
        "commit_info": {"id": "0123456789abcdef"},
        "machine_info": MACHINE,
        "benchmarks": [{"extra_info": {**case, "variants": variants}}],
    }


@pytest.fixture
def page(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    (tmp_path / "results.json").write_text(json.dumps(document(**request.param)))
    page = report.write(tmp_path / "results.json", tmp_path)
    assert page.with_suffix(".svg").stat().st_size > 0
    assert page.name == "benchmarks-avx1024.md"
    return page.read_text()


WIN = {"eager": result(0.048, extra_bytes=3 * 2**20), OURS: result(0.016, extra_bytes=2**20)}
LOSS = {"eager": result(0.048), "chunked": result(0.004), OURS: result(0.016)}
REFUSED = {
    "eager": result(0.048),
    "gram": {"errors": {"output": 0.5}, "refused": "output: relative error 5.00e-01, allowed 2.00e-05"},
    OURS: result(0.016),
}


@pytest.mark.parametrize("page", [WIN], indirect=True)
def test_report_of_a_win(page: str) -> None:
    # 8·N·D·K operations at 1 GFLOP/s take 8 ms; ours takes 16 ms.
    assert (
        "| float32, 1000, 100, 10 | 48.0 | **16.0** (14.4 to 17.6) | 3.00× | 3.00× (eager) | 50% | 1e-07 / 1e-07 |"
        in page
    )
    assert "| step, float32, 1000, 100, 10 | 0.4 | 3.0 |  |  |  | 1.0 |" in page
    assert "In none of the 1 measured cases was a peer faster." in page
    assert "2030-01-02, commit 0123456" in page
    assert "| measured peak, float32 | 1 GFLOP/s |" in page
    assert "Refused" not in page


def test_report_compares_our_own_operations() -> None:
    case = {"dtype": "float32", "rows": 1000, "features": 100, "rank": 10, "ratio": 1.0}
    seconds = {"step": 0.012, "tied": 0.006, "loss": 0.004}
    cases = [{**case, "operation": name, "variants": {OURS: result(time)}} for name, time in seconds.items()]
    assert "| float32, 1000, 100, 10 | 2.00× | 3.00× |" in report.own_ratios(cases)
    assert report.own_ratios(cases[1:]) == ""


@pytest.mark.parametrize("page", [LOSS], indirect=True)
def test_report_of_a_loss(page: str) -> None:
    assert "- step, float32, 1000, 100, 10: 16.0 ms, chunked 4 ms (0.25×)\n" in page
    assert "0.25× (chunked)" in page


@pytest.mark.parametrize("page", [REFUSED], indirect=True)
def test_report_of_a_refusal(page: str) -> None:
    """No time of a wrong result, but the reason."""
    assert "| float32, 1000, 100, 10 | 48.0 | ✗ | **16.0**" in page
    assert "Gram in PyTorch: output: relative error 5.00e-01, allowed 2.00e-05" in page


def test_the_page_of_floors_has_the_tables_of_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    floors.main()
    assert capsys.readouterr().out in (Path(report.__file__).parents[1] / "docs/cpu-kernels.md").read_text()
