"""The figure: photographs rebuilt at each rank, and the yield curves with what was reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..curve import YieldCurve
from ..files import replacing
from .extras import required
from .ranks import RankResult

__all__ = ["Panel", "draw"]


@dataclass
class Panel:
    """One data set: its curve, what each rank reached, and pictures ``[n, 3, height, width]`` by caption."""

    name: str
    curve: YieldCurve
    results: list[RankResult]
    pictures: dict[str, Tensor] = field(default_factory=dict)


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the figure, whole or not at all."""
    matplotlib = required("matplotlib", "matplotlib")
    matplotlib.use("Agg")
    plt = required("matplotlib.pyplot", "matplotlib")
    pictures = {caption: images for panel in panels for caption, images in panel.pictures.items()}
    lines = max((len(images) for images in pictures.values()), default=0)
    figure = plt.figure(figsize=(13, 2.2 * lines + 4.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.2 * lines, 4.2)) if pictures else (None, figure)
    if pictures:
        _draw_pictures(upper, pictures, lines)
    axes = lower.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_curve(axis, panel)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def _draw_pictures(figure: Any, pictures: dict[str, Tensor], lines: int) -> None:
    axes = figure.subplots(lines, len(pictures), squeeze=False)
    for column, (caption, images) in enumerate(pictures.items()):
        for line in range(lines):
            axes[line][column].imshow(images[line].permute(1, 2, 0).numpy())
            axes[line][column].set_axis_off()
        axes[0][column].set_title(caption, fontsize=11)


def _draw_curve(axis: Any, panel: Panel) -> None:
    ranks = range(1, panel.curve.max_rank + 1)
    axis.plot(ranks, panel.curve.yields[1:], color="0.45", label="best possible (Eckart-Young)")
    reached = [(result.rank, result.yielded) for result in panel.results]
    axis.plot(*zip(*reached, strict=True), "o", color="tab:blue", label="reached")
    for rank, value in reached:
        axis.annotate(
            f"rank {rank}\n{value:.1%}", (rank, value), xytext=(7, -26), textcoords="offset points", fontsize=9
        )
    axis.set(xscale="log", xlabel="rank", ylabel="yield", title=f"{panel.name}: yield by rank", ylim=(None, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=9)
