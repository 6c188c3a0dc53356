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
    if any(name.startswith(_RECOVERED) for name in results):
        sections.append(_recovered(results))
    if any(name.startswith(_LATENCY) for name in results):
        sections.append(_texts_latency(results))
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
        "## MiniLM-L6, a sentence encoder\n\nAll Linear layers of its encoder, calibrated on 256 texts of Reuters R8; "
        "mean cosine to the dense model's embedding on 400 test texts, and accuracy of a logistic regression on 400 "
        f"training texts' embeddings (the dense model: {found['dense_probe']:.1%}). Without recovery and without the "
        "gate. Ranks by `output`: where they save most of the model's output error per weight, by a first-order "
        "estimate; by `measured`, the default: the estimate corrected by what each layer alone is measured to cost; "
        "`uniform`: the same share of each layer.\n\n"
        + _table(["weights kept", "factors", "ranks", "cosine", "probe"], rows)
    )


def _recovered(results: dict[str, Any]) -> str:
    found = [results[name] for name in results if name.startswith(_RECOVERED)]
    rows = [
        [
            f"{part['texts']} {_SOURCES[part['source']]}",
            part["tokens"],
            *(part["epochs"], part["lr"], f"{part['cosine']:.3f}", f"{part['probe']:.1%}"),
        ]
        for part in found
    ]
    return (
        "### Recovered\n\nAt 50 %, after learning from the dense model's embeddings of texts without labels and from "
        "the outputs of its layers (all parameters of the model, in batches of 16); the dense model's probe: "
        f"{found[0]['dense_probe']:.1%}.\n\n"
        + _table(["learned from", "tokens of each, at most", "epochs", "learning rate", "cosine", "probe"], rows)
    )


def _texts_latency(results: dict[str, Any]) -> str:
    found = [results[name] for name in results if name.startswith(_LATENCY)]
    rows = [
        [
            "×".join(str(size) for size in part["shape"]),
            f"{part['replaced']} of {part['looked_at']}",
            f"{part['kept']:.0%}",
            *(_ms(part["dense_ms_again"]), _ms(part["ms_again"])),
            f"{part['dense_ms_again'] / part['ms_again']:.2f}×",
            f"{part['cosine']:.3f}",
        ]
        for part in found
    ]
    reasons = sorted({layer["reason"] for part in found for layer in part["layers"] if layer["reason"]})
    return (
        "### Through the latency gate\n\nAt `keep=0.5`, calibrated on 32 texts, without recovery, for batches of one "
        "shape, texts × tokens. The gate judges each layer and then the whole; the milliseconds of a batch were "
        "measured again afterwards, dense and compressed model in turn.\n\n"
        + _table(["batch", "layers replaced", "weights kept", "dense ms", "ms", "", "cosine"], rows)
        + ("\nReasons of refusals:\n\n" + "".join(f"- {reason}\n" for reason in reasons) if reasons else "")
    )


def _ms(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


_RECOVERED = "texts_recovered_"
_SOURCES = {"calibration": "texts, those it was calibrated on", "others": "other texts of the training half"}
_LATENCY = "texts_latency_"
_SECTIONS = {
    "digits": _digits,
    "digits_latency": _digits_latency,
    "texts": _texts,
}


def _figure(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="weights kept (%)", ylabel="cosine to the dense embedding")
    for allocation, label in (("measured", "ranks by measured costs"), ("uniform", "equal shares")):
        rows = [
            row
            for row in sorted(results["texts"]["rows"], key=lambda row: row["keep"])
            if row["allocation"] == allocation and row["method"] == "data_aware"
        ]
        if rows:
            axes.plot([100 * row["keep"] for row in rows], [row["cosine"] for row in rows], "o-", label=label)
    for name, part in results.items():
        if name.startswith(_RECOVERED):
            axes.plot([100 * part["keep"]], [part["cosine"]], "^", label=f"recovered, {part['source']}")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
