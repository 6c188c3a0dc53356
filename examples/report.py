"""What every example ends with: a table, a figure, a JSON file, and a page of the documentation made from that file."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

import byol_fast as bf
from byol_fast.files import replacing

__all__ = ["PAGES", "Cost", "Row", "Tables", "arguments", "cost_of", "finish", "format_table"]

Row = dict[str, Any]
Tables: TypeAlias = "dict[str, list[Row]]"
_Result = TypeVar("_Result")
_ROOT = Path(__file__).resolve().parents[1]
PAGES = {"image": "images.md", "text": "text.md", "recommend": "recommend.md"}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost(NamedTuple):
    """Seconds, and MiB of memory beyond what was there before (Linux only; None elsewhere)."""

    seconds: float
    mib: float | None


def cost_of(run: Callable[[], _Result]) -> tuple[_Result, Cost]:
    """What ``run`` returns, and what it took."""
    if _RESET.exists():
        # What earlier runs freed goes back to the system, where the C library can do that, and the peak starts anew.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        _RESET.write_text("5")
    before, begin = _memory("VmRSS"), time.perf_counter()
    result = run()
    seconds, peak = time.perf_counter() - begin, _memory("VmHWM")
    return result, Cost(seconds, None if peak is None or before is None else max(peak - before, 0.0))


def _memory(field: str) -> float | None:
    if not _RESET.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def arguments(name: str, description: str, tables: Sequence[str]) -> argparse.Namespace:
    """The command line that the examples share: ``--embedded`` needs no data from outside."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=description)
    parser.add_argument(
        "tables",
        nargs="*",
        metavar="table",
        help=f"make only these anew, and leave the others in the JSON file as they are: {', '.join(tables)}",
    )
    parser.add_argument("--embedded", action="store_true", help="small data; nothing is fetched")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the JSON and the figure instead of bench/results and docs",
    )
    options = parser.parse_args()
    for table in options.tables:
        if table not in tables:
            parser.error(f"table: expected one of {', '.join(tables)}, got {table}")
    if options.output is None and options.embedded:
        options.output = Path("demo-output")
    return options


def finish(
    name: str,
    options: argparse.Namespace,
    tables: dict[str, Callable[[Tables], list[Row]]],
    shown: str,
    draw: Callable[[Any, Tables], None] | None,
) -> None:
    """Make and print the tables that are wanted; write the JSON file and the figure.

    Args:
        tables: what makes the rows, by title, given those of the tables before.
        shown: the table that the figure needs.
        draw: draws on matplotlib's ``pyplot``, from the rows by title, what becomes the figure; None leaves it.
    """
    numbers = (options.output or _ROOT / "bench" / "results") / f"{name}.json"
    picture = (options.output or _ROOT / "docs") / f"{name}.png"
    numbers.parent.mkdir(parents=True, exist_ok=True)
    made: Tables = json.loads(numbers.read_text())["tables"] if options.tables and numbers.exists() else {}
    for title in options.tables or tables:
        made[title] = tables[title](made)
        print(f"\n{title}\n{format_table(made[title])}", flush=True)
    rows = {title: made[title] for title in tables if title in made}
    record = {
        "command": f"python -m examples.{name}",
        "machine": _machine(),
        "tables": rows,
    }
    with replacing(numbers) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nnumbers: {numbers}")
    if draw is not None and shown in rows:
        _write_figure(picture, draw, rows)


def _write_figure(picture: Path, draw: Callable[[Any, Tables], None], rows: Tables) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw(pyplot, rows)
    with replacing(picture) as path:
        pyplot.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close("all")
    print(f"figure: {picture}")


def _machine() -> Row:
    return {
        "byol_fast": bf.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table, columns aligned."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def page_of(page: str, record: Row) -> str:
    """The page with the tables of the record in the places marked for them."""
    for title, rows in record["tables"].items():
        begin, end = f"<!-- {title} -->\n", "<!-- end -->"
        before, found, rest = page.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"page: expected a line <!-- {title} --> and a line <!-- end --> after it, found none")
        page = before + begin + format_table(rows) + "\n" + end + rest.partition(end)[2]
    return page


def main() -> None:
    """Fill the tables of the documentation from the committed results."""
    for name, page in PAGES.items():
        results = _ROOT / "bench" / "results" / f"{name}.json"
        if not results.exists():
            continue
        record, path = json.loads(results.read_text()), _ROOT / "docs" / page
        text = page_of(path.read_text(), record)
        with replacing(path) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
