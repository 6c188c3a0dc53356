"""Each example runs whole on data that comes with it, and what it reports hangs together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

# Last, so that an installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from examples import image, recommend, report, text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run an example once and read the tables it wrote: {title: {name of the row: row}}."""
    done: dict[str, dict[str, dict[str, Any]]] = {}

    def tables(module: Any) -> dict[str, dict[str, Any]]:
        name = module.__name__.split(".")[-1]
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [name, "--embedded", "--output", str(folder)])
                # Processes that the example starts find it, too.
                patch.setenv("PYTHONPATH", str(ROOT))
                patch.setenv("BYOL_FAST_DATA", "/nonexistent/nothing-is-fetched")
                module.main()
            assert (folder / f"{name}.png").stat().st_size > 0
            record = json.loads((folder / f"{name}.json").read_text())
            done[name] = {
                title: {str(next(iter(row.values()))): row for row in rows} for title, rows in record["tables"].items()
            }
        return done[name]

    return tables


def test_images_are_compressed_as_well_as_can_be(run):
    table = run(image)["autoencoders"]
    assert abs(table["linear, exact, rank 16"]["loss / Eckart-Young"] - 1) < 1e-4
    assert all(row["loss / Eckart-Young"] > 1 - 1e-4 for name, row in table.items() if name.startswith("linear"))


def test_a_deployed_classifier_is_the_classifier(run):
    rows = {name: row for name, row in run(image)["classifiers"].items() if name.startswith("codes")}
    assert len(rows) == 2
    for row in rows.values():
        assert row["deployed"] == row["accuracy"] > 0.8


def test_training_on_cached_codes_is_training_on_the_data(run):
    rows = run(image)["latent cache"]
    assert rows["ReLU, float32"]["difference of losses, first epoch"] < 1e-5
    assert rows["ReLU, float64"]["of logits"] < 1e-9


def test_fused_training_is_eager_training(run):
    rows = list(run(image)["eager and fused"].values())
    assert len(rows) == 3
    assert all(row["largest relative difference of a loss"] < 1e-4 for row in rows)


def test_codes_find_more_of_the_neighbours_than_the_first_numbers(run):
    rows = list(run(text)["search and classification"].values())
    # Rows of one name come once for each size; the last one is kept.
    recall = {row["code"]: row["recall@10"] for row in rows}
    assert recall["whole embedding"] == 1
    assert recall["bottleneck"] >= recall["first numbers"]


def test_recommendations_are_better_than_popularity_and_the_same_tied(run):
    table = run(recommend)["top 10"]
    ours = next(row for name, row in table.items() if name.startswith("bottleneck"))
    assert ours["nDCG@10"] > table["popularity"]["nDCG@10"]
    assert abs(table["the same, tied"]["nDCG@10"] - ours["nDCG@10"]) < 0.01
    assert {"EASE", "truncated SVD", "bottleneck"} <= run(recommend)["chosen"].keys()
    plain, better = (row["RMSE"] for row in run(recommend)["ratings"].values())
    assert better < plain


def test_the_large_matrix_is_trained_on_in_a_process_of_its_own(run):
    row = next(iter(run(recommend)["scale"].values()))
    assert row["interactions"] > 0
    assert row["peak MiB"] > 0


@pytest.mark.parametrize("name", report.PAGES)
def test_the_documentation_says_what_the_committed_results_say(name):
    page = (ROOT / "docs" / report.PAGES[name]).read_text(encoding="utf-8")
    results = ROOT / "bench" / "results" / f"{name}.json"
    assert results.exists() != ("Results on these data are not committed yet" in page)
    if results.exists():
        assert report.page_of(page, json.loads(results.read_text(encoding="utf-8"))) == page
        assert f"{name}.png" in page


def test_one_table_made_anew_leaves_the_others(tmp_path, monkeypatch):
    def finished(*tables: str, value: int) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["name", *tables, "--output", str(tmp_path)])
        options = report.arguments("name", "", ("first", "second"))
        made = {"first": lambda _: [{"x": value}], "second": lambda rows: [{"x": rows["first"][0]["x"] + 10}]}
        report.finish("name", options, made, "first", None)
        return json.loads((tmp_path / "name.json").read_text())["tables"]

    assert finished(value=1) == {"first": [{"x": 1}], "second": [{"x": 11}]}
    assert finished("first", value=2) == {"first": [{"x": 2}], "second": [{"x": 11}]}
    assert finished("second", value=3) == {"first": [{"x": 2}], "second": [{"x": 12}]}
    with pytest.raises(SystemExit):
        finished("third", value=4)


def test_a_page_without_a_place_for_a_table_is_told():
    record = {"tables": {"a": [{"x": 1.25, "y": None}, {"x": 12345, "z": "w"}]}}
    page = report.page_of("<!-- a -->\nold\n<!-- end -->\nrest", record)
    assert page.splitlines()[1:4] == ["| x      | y | z |", "|--------|---|---|", "| 1.25   |   |   |"]
    assert page.endswith("<!-- end -->\nrest")
    with pytest.raises(ValueError, match="page: expected a line <!-- a -->"):
        report.page_of("nothing", record)
