"""The demonstration: bottlenecks on real data, in all three phases, with an honest table at the end.

Two photographs are cut into patches, compressed at several ranks and rebuilt; digits are classified through a frozen
bottleneck, and the deployed model is loaded again by a fresh process. Both come with scikit-learn. A matrix of the
user's own takes the place of both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .._version import __version__
from ..backends import backends
from ..data import read_matrix
from ..files import replacing
from . import digits, photographs
from .figure import Panel, draw
from .ranks import RankResult, curve_of, result_at
from .table import format_table

__all__ = ["run"]


def run(output: Path, *, data: Path | None = None, ranks: Sequence[int] | None = None, quick: bool = False) -> None:
    """Run the demonstration; figure, models and numbers go to the folder ``output``.

    Args:
        data: a file with a matrix to use instead of the photographs and digits.
        ranks: ranks to try; None chooses by the data.
        quick: fewer rows.

    Raises:
        ModuleNotFoundError: scikit-learn, pillow or matplotlib is missing; the message says how to get them.
        ValueError: ``data`` holds no matrix, or has fewer features than a rank; the message names it.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    print(f"byol_fast {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, status in backends().items():
        print(f"  {name} backend: {status}")
    if data is not None:
        matrix = read_matrix(data)
        parts = [_matrix(matrix, str(data), ranks or _ranks_for(matrix.shape[1]))]
    else:
        parts = [photographs.run(ranks or (8, 32, 128), quick), digits.run(ranks or (4, 8, 16), output)]
    results = [result for panel in parts for result in panel.results]
    print("\n" + format_table(results))
    figure = output / "demo.png"
    draw(parts, figure)
    numbers = output / "demo.json"
    with replacing(numbers) as path:
        path.write_text(json.dumps(_record(results), indent=1) + "\n")
    print(f"\nfigure: {figure}\nnumbers: {numbers}")


def _matrix(matrix: Tensor, name: str, ranks: Sequence[int]) -> Panel:
    if max(ranks) > matrix.shape[1]:
        raise ValueError(
            f"ranks: expected at most the number of features of {name}, {matrix.shape[1]}, got {max(ranks)}"
        )
    print(f"\n{name}: {matrix.shape[0]} rows of {matrix.shape[1]} features")
    curve = curve_of(matrix)
    return Panel(name, curve, [result_at(name, matrix, rank, curve)[0] for rank in ranks])


def _ranks_for(features: int) -> tuple[int, ...]:
    """A thirty-second, an eighth and a half of the features."""
    return tuple(sorted({max(1, features // 32), max(1, features // 8), max(1, features // 2)}))


def _record(results: Sequence[RankResult]) -> dict[str, object]:
    return {
        "command": "byol-fast demo",
        "byol_fast": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "results": [result.as_dict() for result in results],
    }
