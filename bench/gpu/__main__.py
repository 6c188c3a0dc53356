"""``python -m bench.gpu``: probes, checks, times, report.

Each stage is a process of its own, so that none can take the others down; or several, side by side, where most of the
time goes into compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import byol_fast as bf

from . import report
from .device import REHEARSAL, architecture, available, describe

ROOT = Path(__file__).resolve().parents[2]
# Seconds for the whole run, and for one process of it; a rehearsal takes what it takes.
_TOTAL, _STAGE = (3600, 1200) if REHEARSAL else (520, 240)
# Processes side by side where nothing is timed: the checks of Triton's kernels compile hundreds of them, which would
# take one process longer than the whole run may.
_SIDE_BY_SIDE = max(1, min(8, (os.cpu_count() or 1) // 2))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        _stage(options.stage, options.until)
        return 0
    return _run()


def _run() -> int:
    """All stages; the exit status is 1 if anything failed."""
    started = time.time()
    backends = available()
    result: dict[str, Any] = {
        "architecture": architecture(),
        "machine": describe(),
        "backends": {name: str(status) for name, status in bf.backends().items()},
        "probes": {}, "checks": {}, "times": {}, "failures": [],
    }  # fmt: skip
    stages = [["probes"], *(_shares(f"checks {name}") for name in backends)]
    stages += [["sanitize"]] if "cuda" in backends else []
    stages += [_shares("compile"), ["times " + " ".join(backends)]]
    for place, stage in enumerate(stages):
        left = started + _TOTAL - time.time()
        # The times come last and take what is left; the others may not starve them.
        share = left if place == len(stages) - 1 else min(_STAGE, left / 2)
        print(f"{stage[0]}: at most {share:.0f} s", flush=True)
        for line in _side_by_side(stage, share):
            report.take(result, line)
    result["seconds"] = round(time.time() - started)
    report.write(result, ROOT)
    print(report.table(result))
    return 1 if result["failures"] else 0


def _shares(stage: str) -> list[str]:
    return [f"{stage} {place}/{_SIDE_BY_SIDE}" for place in range(_SIDE_BY_SIDE)]


def _side_by_side(stages: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(len(stages)) as pool:
        for lines in pool.map(partial(_lines, seconds=seconds), stages):
            yield from lines


def _lines(stage: str, seconds: float) -> list[dict[str, Any]]:
    """What a stage reports, one JSON object a line, and its own failure if it ended in one."""
    command = [sys.executable, "-m", "bench.gpu", "--stage", stage, "--until", str(time.time() + 0.9 * seconds)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        output, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        output, errors, code = _text(expired.stdout), f"it ran past {seconds:.0f} s", 1
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"kind"')]
    if code != 0:
        last = errors.strip().splitlines()[-1] if errors.strip() else f"exit status {code}"
        lines.append({"kind": "failure", "what": stage, "why": last})
    return lines


def _text(output: bytes | str | None) -> str:
    return output.decode() if isinstance(output, bytes) else output or ""


def _stage(stage: str, until: float) -> None:
    """Runs in a process of its own; reports each finding at once, so that a crash loses only what comes after."""
    kind, *names = stage.split()
    available()
    stages = {"probes": _probes, "checks": _checks, "sanitize": _sanitize, "compile": _compile, "times": _times}
    stages[kind](names, until)


def _report(kind: str, what: str, compute: Callable[[], Any], **more: Any) -> None:
    line: dict[str, Any] = {"kind": kind, "what": what, **more}
    try:
        line["found"] = compute()
    except Exception as error:
        traceback.print_exc()
        line["why"] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    print(json.dumps(line), flush=True)


def _probes(names: list[str], until: float) -> None:
    from .probes import PROBES

    for name, probe in PROBES.items():
        _report("probe", name, probe)


def _checks(names: list[str], until: float) -> None:
    from .checks import checks

    backend, share = names
    with bf.use_backend(backend):
        for name, classes, check in list(checks(backend))[_every(share)]:
            if time.time() > until:
                check = _no_time
            _report("check", name, check, backend=backend, classes=sorted(classes))


def _every(share: str) -> slice:
    """ "1/4" of a list: every fourth item from the second on."""
    place, of = map(int, share.split("/"))
    return slice(place, None, of)


def _sanitize(names: list[str], until: float) -> None:
    from .checks import every_class
    from .sanitize import TOOLS, sanitize

    for place, tool in enumerate(TOOLS):
        seconds = (until - time.time()) / (len(TOOLS) - place)
        check = partial(sanitize, tool, seconds) if seconds > 1 else _no_time
        _report("check", f"compute-sanitizer, {tool}", check, backend="cuda", classes=sorted(every_class()))


def _no_time() -> None:
    raise TimeoutError("no time left")


def _compile(names: list[str], until: float) -> None:
    """Leaves the kernels that will be timed in Triton's cache. What fails here is reported with the times."""
    from .timing import CASES, REHEARSED, contenders

    (share,) = names
    for case in (REHEARSED if REHEARSAL else CASES)[_every(share)]:
        if time.time() < until:
            with suppress(Exception):
                contenders(case, ["triton"])["triton"]()()


def _times(names: list[str], until: float) -> None:
    from .timing import CASES, REHEARSED, contenders, measure

    for case in REHEARSED if REHEARSAL else CASES:
        if time.time() > until:
            print(json.dumps({"kind": "failure", "what": f"times of {case.id}", "why": "no time left"}), flush=True)
            continue
        for contender, make in contenders(case, names).items():
            _report("time", contender, lambda make=make: measure(make), case=case.id, call_class=case.call_class())


if __name__ == "__main__":
    sys.exit(main())
