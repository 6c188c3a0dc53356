"""The table the demonstration prints."""

from __future__ import annotations

from collections.abc import Sequence

from .ranks import RankResult

__all__ = ["format_table"]

_COLUMNS = (
    "data",
    "rank",
    "parameters",
    "yield",
    "best yield",
    "accuracy dense",
    "accuracy ours",
    "step eager",
    "step ours",
    "speed-up",
    "backend",
)


def format_table(results: Sequence[RankResult]) -> str:
    """Columns aligned, first to the left, others to the right."""
    rows = [_COLUMNS, *(_cells(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(result: RankResult) -> tuple[str, ...]:
    return (
        result.data,
        str(result.rank),
        f"{result.parameter_share:.1%}",
        f"{result.yielded:.2%}",
        f"{result.best:.2%}",
        "-" if result.dense_accuracy is None else f"{result.dense_accuracy:.1%}",
        "-" if result.accuracy is None else f"{result.accuracy:.1%}",
        f"{result.eager_ms:.2f} ms",
        f"{result.ours_ms:.2f} ms",
        f"{result.eager_ms / result.ours_ms:.1f}×",
        result.backend,
    )
