"""What the stages report, gathered: the JSON, the table, and what ``auto`` may use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from byol_fast import files

from .timing import CASES, REHEARSED, floor_us

PACKAGE = "byol_fast/backends/verified.json"


def take(result: dict[str, Any], line: dict[str, Any]) -> None:
    """One line of a stage, into its place; failures are listed, too."""
    kind, what = line["kind"], line["what"]
    if kind == "probe":
        result["probes"][what] = line.get("found")
    elif kind == "check":
        status = {"passed": "why" not in line, "classes": line["classes"]}
        result["checks"].setdefault(line["backend"], {})[what] = status
        what = f"{line['backend']}: {what}"
    elif kind == "time" and "found" in line:
        case = result["times"].setdefault(line["case"], {"class": line["call_class"], "contenders": {}})
        case["contenders"][what] = line["found"]
    elif kind == "time":
        what = f"{line['case']}: {what}"
    if "why" in line:
        result["failures"].append({"what": what, "why": line["why"]})


def findings(result: dict[str, Any], source: str) -> dict[str, Any]:
    """For each class of calls that was timed: the backends whose every check passed, and the fastest of them and eager.

    The fastest is judged by the worst case of the class: a backend has to win everywhere in it.
    """
    found: dict[str, Any] = {}
    for case in result["times"].values():
        name = case["class"]
        verified = [backend for backend, checks in result["checks"].items() if _passed(checks, name)]
        medians = {backend: value["median_us"] for backend, value in case["contenders"].items()}
        candidates = {backend: medians[backend] for backend in verified if backend in medians}
        candidates["reference"] = medians.get("eager", 0.0)
        fastest = min(candidates, key=lambda backend: candidates[backend])
        if name in found and found[name]["fastest"] != fastest:
            fastest = "reference"
        found[name] = {"verified": sorted(verified), "fastest": fastest, "source": source}
    return found


def _passed(checks: dict[str, Any], name: str) -> bool:
    concerned = [check for check in checks.values() if name in check["classes"]]
    return bool(concerned) and all(check["passed"] for check in concerned)


def write(result: dict[str, Any], root: Path) -> None:
    """The results and the table; unless it was a rehearsal, also what ``auto`` may use."""
    rehearsal = result["architecture"] == "rehearsal"
    folder = Path(".benchmarks" if rehearsal else "bench/results")
    name = f"gpu-{result['architecture']}"
    source = (folder / f"{name}.json").as_posix()
    result["findings"] = findings(result, source)
    (root / folder).mkdir(exist_ok=True)
    _put(root / source, json.dumps(result, indent=1) + "\n")
    _put(root / folder / f"{name}.md", table(result))
    if not rehearsal:
        package = json.loads((root / PACKAGE).read_text(encoding="utf-8"))
        package[result["architecture"]] = result["findings"]
        _put(root / PACKAGE, json.dumps(package, indent=1, sort_keys=True) + "\n")


def _put(path: Path, text: str) -> None:
    with files.replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The findings in Markdown."""
    lines = [f"# GPU run: {result['machine']['device']}, {result['architecture']}", ""]
    lines += [f"`make gpu`, {result.get('seconds', '?')} s. Versions: torch {result['machine']['torch']}, "
              f"triton {result['machine']['triton']}.", "", "| probe | found |", "|---|---|"]  # fmt: skip
    lines += [f"| {name} | {_words(found)} |" for name, found in result["probes"].items()]
    lines += ["", "| backend | checks passed | of |", "|---|---|---|"]
    for backend, checks in result["checks"].items():
        lines.append(f"| {backend} | {sum(check['passed'] for check in checks.values())} | {len(checks)} |")
    lines += ["", "| case | contender | median, µs | eager ÷ this | share of the two-pass floor | extra memory, MB |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for case_id, case in result["times"].items():
        eager = case["contenders"].get("eager", {}).get("median_us")
        for name, found in case["contenders"].items():
            share = _share(result, case_id, found["median_us"])
            memory = "" if found["extra_bytes"] is None else f"{found['extra_bytes'] / 1e6:.1f}"
            ratio = "" if eager is None else f"{eager / found['median_us']:.2f}"
            lines.append(f"| {case_id} | {name} | {found['median_us']:.1f} | {ratio} | {share} | {memory} |")
    lines += ["", "## Failures", ""]
    lines += [f"- {failure['what']}: {failure['why']}" for failure in result["failures"]] or ["None."]
    return "\n".join(lines) + "\n"


def _words(found: Any) -> str:
    if found is None:
        return "failed"
    words = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in found.items()}
    return ", ".join(f"{key} {value}" for key, value in words.items())


def _share(result: dict[str, Any], case_id: str, median_us: float) -> str:
    probes = result["probes"]
    case = next((case for case in [*CASES, *REHEARSED] if case.id == case_id), None)
    if case is None or not probes.get("copy_bandwidth") or not probes.get("matrix_peak"):
        return ""
    floor = floor_us(case, probes["copy_bandwidth"]["bytes_per_s"], probes["matrix_peak"]["operations_per_s"])
    return "" if floor is None else f"{100 * floor / median_us:.0f} %"
