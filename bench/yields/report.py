"""From results to the page docs/yield.md."""

from __future__ import annotations

from typing import Any

from .fits import ALLOWED, OURS

_HEAD = """# Yield: the closed solution, measured

`make bench-yield` writes this page and [bench/results/yield.json](../bench/results/yield.json). Times are medians of
interleaved rounds in one process, peers included; ours / theirs below 1 means that we are faster.

{device}, {threads} threads, torch {torch}, scikit-learn {sklearn}, Python {python}.
"""


def page(measured: dict[str, Any]) -> str:
    """The report of those parts that were measured."""
    machine = measured["machine"]
    head = _HEAD.format(**{**machine, "sklearn": machine["scikit-learn"]})
    parts = {"fits": _fits, "stream": _stream, "large": _large}
    return "\n".join([head, *(part(measured[name]) for name, part in parts.items() if name in measured)])


def _fits(part: dict[str, Any]) -> str:
    mine = part["fits"][OURS]["seconds"]
    rows = [
        "## In memory",
        "",
        f"Fashion-MNIST, {part['rows'][0]:,} × {part['rows'][1]} float32, {part['rank']} components. Loss: relative to "
        f"the best possible one (Eckart and Young), computed in float64; ≤ {ALLOWED} counts as equal.",
        "",
        "| fit | loss | seconds | ours / theirs |",
        "|---|---|---|---|",
    ]
    for name, fit in part["fits"].items():
        ratio = "" if name == OURS else f"{mine / fit['seconds']:.2f}"
        rows.append(f"| `{name}` | {fit['loss']:.6f} | {fit['seconds']:.2f} | {ratio} |")
    adam = part["adam"]
    end = "to 1.01 ×" if adam["reached"] else "stopped at"
    rows.append(
        f"| Adam through eager PyTorch, batches of {adam['batch']}, lr {adam['lr']:g}, {adam['epochs']} epochs, "
        f"{end} the best loss | {adam['loss']:.6f} | {adam['seconds']:.2f} | {mine / adam['seconds']:.4f} |"
    )
    return "\n".join([*rows, "", _verdict(part), ""])


def _verdict(part: dict[str, Any]) -> str:
    mine = part["fits"][OURS]["seconds"]
    lost = [
        f"`{name}` ({mine / fit['seconds']:.2f} × its time)"
        for name, fit in part["fits"].items()
        if name != OURS and fit["seconds"] < mine and fit["loss"] <= ALLOWED
    ]
    worse = [f"`{name}`" for name, fit in part["fits"].items() if fit["loss"] > ALLOWED]
    lines = ["Slower than: " + ", ".join(lost) + "." if lost else "No fit with an equal loss is faster."]
    if worse:
        lines.append("Not equal in loss: " + ", ".join(worse) + ".")
    return " ".join(lines)


def _stream(part: dict[str, Any]) -> str:
    times = part["seconds"]
    mine = next(iter(times.values()))
    lines = [
        "## From disk",
        "",
        f"{part['rows'][0]:,} × {part['rows'][1]} float32 in a `.npy` file: patches of 10 × 10 pixels of "
        'Fashion-MNIST. All components, with scikit-learn\'s `PCA(svd_solver="covariance_eigh")`. The file is in the '
        "cache of the system.",
        "",
        "| fit | seconds | ours / theirs | extra memory |",
        "|---|---|---|---|",
    ]
    memory = [part["extra_bytes"]["ours"], None, part["extra_bytes"]["theirs"]]
    for (name, seconds), extra in zip(times.items(), memory, strict=True):
        ratio = "" if seconds == mine else f"{mine / seconds:.2f}"
        lines.append(f"| {name} | {seconds:.3f} | {ratio} | {'' if extra is None else f'{extra / 1e6:.0f} MB'} |")
    error = part["error_of_variances"]
    lines += ["", f"Relative error of our variances against a fit in float64: {error:.1e}.", ""]
    return "\n".join(lines)


def _large(part: dict[str, Any]) -> str:
    size, limit = part["bytes"] / 1e9, part["limit_bytes"] / 2**30
    end = (
        f"completed in {part['seconds']:.0f} s: yield {part['told']['yield']} at rank 16, certificate "
        f"{part['told']['certificate'].split(' ')[0]}"
        if part["completed"]
        else f"failed: {part['error']}"
    )
    return (
        f"## Larger than memory\n\n`byol-fast pretrain` on {part['rows'][0]:,} × {part['rows'][1]} float32, "
        f"{size:.0f} GB on disk, in a process that may allocate {limit:.0f} GiB (`RLIMIT_DATA`): {end}. The largest "
        f"resident set of any child process was {part['largest_resident_bytes_of_a_child'] / 1e9:.2f} GB.\n"
    )
