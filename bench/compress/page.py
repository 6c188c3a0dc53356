"""docs/compress.md and its figure, from the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byol_fast.files import replacing

_GOALS = {16: 0.995, 8: 0.98, 6: 0.96}


def write(results: dict[str, Any], folder: Path) -> None:
    """Write the page, with a section for each part that was measured."""
    sections = [_head(results["machine"])]
    for name, section in _SECTIONS.items():
        if name in results:
            sections.append(section(results[name]))
    if "texts" in results:
        _figure(results, folder / "compress.png")
        sections.append("![Cosine of the embedding over the weights kept](compress.png)\n")
    with replacing(folder / "compress.md") as temporary:
        temporary.write_text("\n".join(sections), encoding="utf-8")


def _head(machine: dict[str, Any]) -> str:
    return (
        "# Whole models, compressed\n\n"
        "`bf.compress` on two real models. What it is calibrated on is not tested on. `make "
        "bench-compress` writes this "
        "page, its figure and [bench/results/compress.json](../bench/results/compress.json).\n\n"
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}.\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def _digits(found: dict[str, Any]) -> str:
    rows = [[row["rank"], row["method"].replace("svd", "plain SVD"), f"{row['accuracy']:.2%}"] for row in found["rows"]]
    return (
        "## A network for handwritten digits\n\nIts largest layer, Linear(3136, 128), alone, "
        "calibrated on 1000 images; "
        f"accuracy on the other 4000. The dense network: {found['dense']:.2%}.\n\n"
        + _table(["rank", "method", "accuracy"], rows)
    )


def _digits_latency(found: dict[str, Any]) -> str:
    rows = [
        [
            *(row["batch"], row["rank"], f"{row['dense_ms']:.3f}", f"{row['ms']:.3f}"),
            f"{row['dense_ms'] / row['ms']:.1f}×",
        ]
        for row in found["layer"]
    ]
    whole = (
        f"The whole network at `keep=0.1` through the latency gate: {found['replaced']} of "
        f"{found['looked_at']} layers "
        f"are replaced, {found['kept']:.1%} of their weights are left, a batch of 32 takes "
        f"{_ms(found['ms'])} ms instead "
        f"of {_ms(found['dense_ms'])} ms, accuracy {found['accuracy']:.2%}.\n"
    )
    return (
        "### Milliseconds of that layer\n\n" + _table(["batch", "rank", "dense", "bottleneck", ""], rows) + "\n" + whole
    )


def _texts(found: dict[str, Any]) -> str:
    rows = [
        [
            *(f"{row['keep']:.0%}", row["method"].replace("svd", "plain SVD"), row["allocation"]),
            *(f"{row['cosine']:.3f}", f"{row['probe']:.1%}"),
        ]
        for row in found["rows"]
    ]
    return (
        "## MiniLM-L6, a sentence encoder\n\nAll Linear layers of its encoder, calibrated on 256 "
        "texts of Reuters R8; mean "
        "cosine to the dense model's embedding on 400 test texts, and accuracy of a logistic "
        "regression on 800 training "
        f"texts' embeddings (the dense model: {found['dense_probe']:.1%}). Without recovery and "
        f"without the gate. Ranks "
        "by `output`: where they save most of the model's output error per weight; `uniform`: the same share of each "
        "layer.\n\n" + _table(["weights kept", "factors", "ranks", "cosine", "probe"], rows)
    )


def _recovered(found: dict[str, Any]) -> str:
    rows = [[row["texts"], row["epochs"], f"{row['cosine']:.3f}", f"{row['probe']:.1%}"] for row in found["rows"]]
    return (
        "### Recovered\n\nAt 50 %, after distillation on so many texts without labels (the first line: those it was "
        f"calibrated on); the dense model's probe: {found['dense_probe']:.1%}.\n\n"
        + _table(["texts", "epochs", "cosine", "probe"], rows)
    )


def _texts_latency(found: dict[str, Any]) -> str:
    reasons = sorted({layer["reason"] for layer in found["layers"] if layer["reason"]})
    shape = "×".join(str(size) for size in found["shape"])
    text = (
        f"### Through the latency gate\n\nAt `keep=0.5`, calibrated on 64 texts, judged at a batch "
        f"of {shape} tokens: "
        f"{found['replaced']} of {found['looked_at']} layers measure faster as bottlenecks and are replaced, "
        f"{found['kept']:.1%} of the weights are left, a batch takes {_ms(found['ms'])} ms instead of "
        f"{_ms(found['dense_ms'])} ms; cosine {found['cosine']:.3f}.\n"
    )
    return text + ("\nReasons of refusals:\n\n" + "".join(f"- {reason}\n" for reason in reasons) if reasons else "")


def _ms(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


_SECTIONS = {
    "digits": _digits,
    "digits_latency": _digits_latency,
    "texts": _texts,
    "texts_recovered": _recovered,
    "texts_latency": _texts_latency,
}


def _figure(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="weights kept (%)", ylabel="cosine to the dense embedding")
    for allocation in ("output", "uniform"):
        rows = [
            row for row in results["texts"]["rows"] if row["allocation"] == allocation and row["method"] == "data_aware"
        ]
        label = f"ranks by {allocation}" if allocation == "output" else "equal shares"
        axes.plot([100 * row["keep"] for row in rows], [row["cosine"] for row in rows], "o-", label=label)
    for row in results.get("texts_recovered", {}).get("rows", []):
        axes.plot([100 * row["keep"]], [row["cosine"]], "^", label=f"recovered on {row['texts']} texts")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
