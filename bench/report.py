"""The report page, from a result file: ``python -m bench.report RESULTS.json FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .cases import OPERATIONS, OURS
from .machine import arithmetic_peak

PEERS = ("eager", "compiled", "chunked", "gram")
LABELS = {"eager": "eager", "compiled": "torch.compile", "chunked": "chunked", "gram": "Gram in PyTorch", OURS: OURS}
BYTES = {"float32": 4, "bfloat16": 2}

INTRODUCTION = """# Benchmarks: {instruction_set}

Made by `make bench` ({date}, commit {commit}), which writes `bench/results/cpu-{instruction_set}.json`, for a
machine of this kind, and this page from it; do not edit it by hand.

| | |
|---|---|
{machine}

**How.** All variants of a case run in one process, in turn, round after round; times are medians over the rounds, ours
with the 20th and 80th percentile. Every result is first checked against float64 from the same rounded inputs: a variant
whose loss or gradients are off by more than the accuracy contract allows (for float32 twice what eager PyTorch is off
by, or 2e-5 if that is more; for bfloat16 1.05 times, or 2e-3) has no time here, only a ✗. `byol_fast` chooses its
backend by itself, as it does for a user.

**The peers.** *eager*: `F.mse_loss` of two `F.linear`, through autograd. *torch.compile*: the same, compiled for the
very shape. *chunked*: row chunks that stay in cache, gradients by hand, temporaries reused. *Gram in PyTorch*: the same
algebra as ours, in PyTorch's own operations. Their code is `bench/peers.py`.

**Share of floor.** The floor is the least time in which this machine could do the work: arithmetic (for a training step
8·N·D·K operations) at the measured peak, or traffic (N×D matrices that must be read or written at least once) at the
measured copy bandwidth, whichever takes longer.

![Speed-up by rank, share of floor, memory, error](benchmarks-{instruction_set}.svg)
"""


def write(results: Path, folder: Path) -> Path:
    """Write the page, and the plots beside it, into ``folder``; returns the page."""
    document = json.loads(results.read_text())
    cases = [benchmark["extra_info"] for benchmark in document["benchmarks"]]
    machine = document["machine_info"]
    written = folder / f"benchmarks-{machine['instruction_set']}.md"
    written.write_text(page(document, cases, machine))
    plot(cases, machine, written.with_suffix(".svg"))
    return written


def page(document: dict, cases: Sequence[dict], machine: dict) -> str:
    parts = [
        INTRODUCTION.format(
            instruction_set=machine["instruction_set"],
            date=document["datetime"][:10],
            commit=(document["commit_info"].get("id") or "unknown")[:7],
            machine="\n".join(f"| {name} | {value} |" for name, value in described(machine)),
        )
    ]
    for name, operation in OPERATIONS.items():
        chosen = [case for case in cases if case["operation"] == name]
        if chosen:
            parts += [f"## {operation.title}\n", times(chosen, machine)]
    return "\n".join([*parts, own_ratios(cases), memory(cases), losses(cases), refusals(cases)])


def described(machine: dict) -> Iterable[tuple[str, object]]:
    for name, value in machine.items():
        if name != "peak":
            yield name.replace("_", " "), value
    for name, value in machine["peak"].items():
        unit = "GB/s, read and written" if name == "copy" else "GFLOP/s"
        yield f"measured peak, {name}", f"{value / 1e9:.0f} {unit}"


def times(cases: Sequence[dict], machine: dict) -> str:
    peers = [peer for peer in PEERS if any(peer in case["variants"] for case in cases)]
    rows = []
    for case in cases:
        ours = case["variants"][OURS]
        rows.append(
            [
                shape(case),
                *(time_of(case, peer) for peer in peers),
                f"**{milliseconds(ours['p50'])}** ({milliseconds(ours['p20'])} to {milliseconds(ours['p80'])})",
                *(f"{ratio(case, peer):.2f}×" if ratio(case, peer) else "" for peer in peers[:2]),
                best_peer(case),
                f"{share_of_floor(case, machine):.0%}" if floor(case, machine) else "",
                f"{worst_error(case, OURS):.0e} / {worst_error(case, 'eager'):.0e}",
            ]
        )
    header = [
        "dtype, N, D, K",
        *(f"{LABELS[peer]}, ms" for peer in peers),
        f"{OURS}, ms",
        *(f"over {LABELS[peer]}" for peer in peers[:2]),
        "over the best peer",
        "share of floor",
        "worst error, ours / eager's",
    ]
    return table(header, rows)


def own_ratios(cases: Sequence[dict]) -> str:
    """What tied weights save over untied ones, and a loss without gradients over a step, at one shape."""
    times = {(case["operation"], shape(case)): case["variants"][OURS]["p50"] for case in cases}
    rows = [
        [name, *(f"{times['step', name] / other:.2f}×" if other else "" for other in others)]
        for operation, name in times
        if operation == "step" and any(others := [times.get((kind, name)) for kind in ("tied", "loss")])
    ]
    header = ["dtype, N, D, K", "tied weights over untied", "loss only over the step"]
    return f"## Our own operations compared\n\n{table(header, rows)}" if rows else ""


def memory(cases: Sequence[dict]) -> str:
    """The peak of extra memory of one call, results included."""
    chosen = [case for case in cases if case["variants"][OURS].get("extra_bytes") is not None]
    if not chosen:
        return ""
    rows = [
        [
            f"{case['operation']}, {shape(case)}",
            f"{case['rows'] * case['features'] * BYTES[case['dtype']] / 2**20:.1f}",
            *(megabytes(case["variants"].get(variant, {}).get("extra_bytes")) for variant in (*PEERS, OURS)),
        ]
        for case in chosen
    ]
    header = ["operation, dtype, N, D, K", "one N×D matrix", *(LABELS[variant] for variant in (*PEERS, OURS))]
    note = (
        "Peak of extra memory of one call, in MiB, in a process of its own: resident memory at the peak less resident "
        "memory before, so gradients and every temporary count, whoever allocated them; the arguments do not.\n"
    )
    return f"## Memory\n\n{note}\n{table(header, rows)}"


def losses(cases: Sequence[dict]) -> str:
    """Every case in which a correct peer is faster."""
    lines = []
    for case in cases:
        for peer in PEERS:
            if (factor := ratio(case, peer)) and factor < 1:
                ours, theirs = case["variants"][OURS], case["variants"][peer]
                overlap = ours["p20"] <= theirs["p80"]
                lines.append(
                    f"- {case['operation']}, {shape(case)}: {milliseconds(ours['p50'])} ms, {LABELS[peer]} "
                    f"{milliseconds(theirs['p50'])} ms ({factor:.2f}×{', within the spread of the samples' * overlap})"
                )
    body = "\n".join(lines) or f"In none of the {len(cases)} measured cases was a peer faster."
    return f"## Where we lose\n\n{body}\n"


def refusals(cases: Sequence[dict]) -> str:
    lines = [
        f"- {case['operation']}, {shape(case)}: {LABELS[name]}: {variant['refused']}"
        for case in cases
        for name, variant in case["variants"].items()
        if variant["refused"]
    ]
    return "## Refused: outside the accuracy contract\n\n" + "\n".join(lines) + "\n" if lines else ""


def shape(case: dict) -> str:
    sizes = [case["rows"], case["features"], *([case["rank"]] if case["rank"] else [])]
    missed = "" if case["ratio"] == 1 else f" (misses {case['ratio']:g})"
    return f"{case['dtype']}, {', '.join(map(str, sizes))}{missed}"


def ratio(case: dict, peer: str) -> float | None:
    """How many times faster ours is; None where there is no such peer, or no speed of it."""
    theirs = case["variants"].get(peer, {}).get("p50")
    return theirs and theirs / case["variants"][OURS]["p50"]


def best_peer(case: dict) -> str:
    factors = {peer: factor for peer in PEERS if (factor := ratio(case, peer))}
    peer = min(factors, key=factors.__getitem__)
    return f"{factors[peer]:.2f}× ({LABELS[peer]})"


def floor(case: dict, machine: dict) -> float | None:
    """The least seconds on this machine; None where its peak or the work is unknown."""
    operation, peak = OPERATIONS[case["operation"]], machine["peak"]
    if operation.sparse or case["dtype"] not in peak:
        return None
    area = case["rows"] * case["features"]
    arithmetic = operation.arithmetic * area * case["rank"] / arithmetic_peak(peak, case["dtype"])
    return max(arithmetic, operation.traffic * area * BYTES[case["dtype"]] / peak["copy"])


def share_of_floor(case: dict, machine: dict) -> float:
    return (floor(case, machine) or 0) / case["variants"][OURS]["p50"]


def worst_error(case: dict, variant: str) -> float:
    return max(case["variants"][variant]["errors"].values())


def time_of(case: dict, peer: str) -> str:
    variant = case["variants"].get(peer)
    if variant is None:
        return ""
    return "✗" if variant["refused"] else milliseconds(variant["p50"])


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(cases: Sequence[dict], machine: dict, path: Path) -> None:
    """Four panels: speed-up by rank, share of floor, memory, error against speed."""
    import matplotlib

    matplotlib.use("svg")
    # The same results give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "byol_fast"
    from matplotlib import pyplot

    figure, ((by_rank, shares), (memories, errors)) = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    steps = [case for case in cases if case["operation"] == "step"]
    plot_by_rank(by_rank, steps)
    plot_shares(shares, steps, machine)
    plot_memory(memories, steps)
    plot_errors(errors, steps)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def plot_by_rank(axes, steps: Sequence[dict]) -> None:
    """Over the (N, D) at which most ranks were measured."""
    usual = [case for case in steps if case["ratio"] == 1]
    ranks = [(case["rows"], case["features"]) for case in usual]
    rows, features = most = max(ranks, key=ranks.count)
    for dtype, line in (("float32", "o-"), ("bfloat16", "s--")):
        for peer, colour in (("eager", "C0"), ("compiled", "C1")):
            points = sorted(
                (case["rank"], factor)
                for case in usual
                if (case["rows"], case["features"]) == most and case["dtype"] == dtype and (factor := ratio(case, peer))
            )
            axes.plot(
                *zip(*points, strict=True) if points else ([], []), line, color=colour, label=f"{LABELS[peer]}, {dtype}"
            )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="rank K", ylabel="times faster")
    axes.set_title(f"Training step, N = {rows}, D = {features}: speed-up over …")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}" if axis is axes.yaxis else "")
    axes.set_xticks(sorted({case["rank"] for case in usual if (case["rows"], case["features"]) == most}))
    axes.legend()


def plot_shares(axes, steps: Sequence[dict], machine: dict) -> None:
    chosen = [case for case in steps if floor(case, machine)]
    colours = ["C2" if case["dtype"] == "float32" else "C4" for case in chosen]
    axes.barh([shape(case) for case in chosen], [100 * share_of_floor(case, machine) for case in chosen], color=colours)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of the floor set by the measured peak")
    axes.set_title("Training step: share of floor")


def plot_memory(axes, steps: Sequence[dict]) -> None:
    chosen = [case for case in steps if case["variants"][OURS].get("extra_bytes") is not None]
    variants = (*PEERS, OURS)
    height = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        sizes = [(case["variants"].get(variant, {}).get("extra_bytes") or 0) / 2**20 for case in chosen]
        axes.barh([row + index * height for row in range(len(chosen))], sizes, height, label=LABELS[variant])
    axes.set_yticks([row + 0.4 for row in range(len(chosen))], [shape(case) for case in chosen])
    axes.invert_yaxis()
    axes.set(xlabel="MiB")
    axes.set_title("Training step: peak of extra memory")
    axes.legend()


def plot_errors(axes, steps: Sequence[dict]) -> None:
    for dtype, marker in (("float32", "o"), ("bfloat16", "s")):
        for variant in (*PEERS, OURS):
            points = [
                (case["variants"]["eager"]["p50"] / found["p50"], worst_error(case, variant))
                for case in steps
                if case["dtype"] == dtype and (found := case["variants"].get(variant, {})).get("p50")
            ]
            colour = f"C{(*PEERS, OURS).index(variant)}"
            label = LABELS[variant] if dtype == "float32" else None
            axes.scatter(*zip(*points, strict=True) if points else ([], []), marker=marker, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="times faster than eager", ylabel="worst relative error")
    axes.set_title("Training step: error beside speed (circles float32, squares bfloat16)")
    axes.legend()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
