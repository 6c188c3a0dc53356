"""What compression did, layer by layer, in numbers that were measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from ..files import replacing

__all__ = ["CompressionReport", "LayerReport"]


@dataclass
class LayerReport:
    """One layer.

    Attributes:
        name: of the module; of layers that share a weight, the first.
        kind: of layer.
        weights: of the dense layer.
        rank: of its bottleneck; None if it stays dense.
        kept: share of its weights that are left; 1 if it stays dense.
        error: local error: share of the energy of its outputs that is lost, as it matters to the model's output.
        dense_ms, ms: milliseconds of all its calls for one batch, dense and now; None where not measured.
        reason: why it stays dense.
    """

    name: str
    kind: str
    weights: int
    rank: int | None = None
    kept: float = 1.0
    error: float = 0.0
    dense_ms: float | None = None
    ms: float | None = None
    reason: str = ""


@dataclass
class CompressionReport:
    """What :func:`byol_fast.compress` did.

    Attributes:
        layers: a :class:`LayerReport` for each layer that was looked at.
        weights_before, weights: weights of these layers, before and now.
        parameters_before, parameters: all parameters of the model, before and now.
        error: ‖f − f′‖ / ‖f‖ of the model's output over the calibration data; NaN without data.
        error_before_recovery: the same before recovery; None without recovery.
        dense_ms, ms: milliseconds of the whole model for the first batch, before and now; None where not measured.
        history: what recovery did, a row an epoch.
        notes: what else there is to know.
    """

    layers: list[LayerReport]
    parameters_before: int
    parameters: int
    error: float
    error_before_recovery: float | None = None
    dense_ms: float | None = None
    ms: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def weights_before(self) -> int:
        """Weights of the layers that were looked at."""
        return sum(layer.weights for layer in self.layers)

    @property
    def weights(self) -> int:
        """Weights of these layers now."""
        return sum(round(layer.kept * layer.weights) for layer in self.layers)

    @property
    def kept(self) -> float:
        """Share of the weights of these layers that are left."""
        return self.weights / self.weights_before if self.weights_before else 1.0

    @property
    def replaced(self) -> list[LayerReport]:
        """The layers that are bottlenecks now."""
        return [layer for layer in self.layers if layer.rank is not None]

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as a JSON text; with a path, it is written there, too, whole or not at all."""
        content: dict[str, Any] = {"kept": self.kept, "weights_before": self.weights_before, "weights": self.weights}
        text = json.dumps({**content, **asdict(self)}, indent=1) + "\n"
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        header = ("layer", "kind", "weights", "rank", "kept", "error", "ms before", "ms", "")
        rows = [header, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, "", *self.summary()])

    def summary(self) -> list[str]:
        """The whole in a few lines."""
        lines = [
            f"{len(self.replaced)} of {len(self.layers)} layers are bottlenecks; they keep {self.kept:.1%} of "
            f"{self.weights_before:,} weights",
            f"{self.parameters:,} of the model's {self.parameters_before:,} parameters are left",
        ]
        before = self.error_before_recovery
        lines.append(
            f"error of the output: {self.error:.2%}" + ("" if before is None else f" ({before:.2%} before recovery)")
        )
        if self.dense_ms is not None and self.ms is not None:
            lines.append(f"a batch takes {self.ms:.2f} ms, before {self.dense_ms:.2f} ms")
        return [*lines, *self.notes]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw error against size, and milliseconds before and after, layer by layer, into a file.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise ModuleNotFoundError("plot needs matplotlib: pip install 'byol_fast[plot]'") from None
        replaced = self.replaced
        measured = [layer for layer in replaced if layer.ms is not None and layer.dense_ms is not None]
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.scatter([100 * layer.kept for layer in replaced], [100 * layer.error for layer in replaced])
        for layer in replaced if len(replaced) <= 12 else []:
            left.annotate(layer.name, (100 * layer.kept, 100 * layer.error), fontsize=7)
        left.set(xlabel="weights kept (%)", ylabel="energy of its output lost (%)", title="each bottleneck")
        left.grid(alpha=0.3)
        right.scatter([layer.dense_ms for layer in measured], [layer.ms for layer in measured])
        end = 1.05 * max((layer.dense_ms or 0.0 for layer in measured), default=1.0)
        right.plot([0, end], [0, end], color="0.6", linestyle="--")
        right.set(xlabel="ms before", ylabel="ms now", title="each bottleneck; below the line is faster")
        right.grid(alpha=0.3)
        figure.suptitle(self.summary()[0], fontsize=9)
        with replacing(path) as temporary:
            figure.savefig(temporary)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    dense = layer.rank is None
    times = ["" if value is None else f"{value:.3f}" for value in (layer.dense_ms, layer.ms)]
    error = "" if dense else f"{layer.error:.2%}"
    rank = "dense" if dense else str(layer.rank)
    return (layer.name, layer.kind, f"{layer.weights:,}", rank, f"{layer.kept:.0%}", error, *times, layer.reason)


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Text to the left, numbers to the right."""
    left = (0, 1, len(row) - 1)
    return [
        cell.ljust(width) if column in left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
