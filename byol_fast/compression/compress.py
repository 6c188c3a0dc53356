"""compress: a whole model made smaller, and faster where that is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .analysis import Analysis, check_goal
from .find import Choice
from .recover import Recovery
from .report import CompressionReport

__all__ = ["compress"]


def compress(
    model: nn.Module,
    calibration: Any,
    *,
    keep: float | None = None,
    error: float | None = None,
    latency: float | None = None,
    method: str = "data_aware",
    allocation: str = "measured",
    sequential: bool = False,
    gate: str = "latency",
    margin: float = 0.05,
    include: Choice = None,
    exclude: Choice = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batch_size: int = 32,
    recovery: Recovery | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[nn.Module, CompressionReport]:
    """A copy of a trained model with bottlenecks in place of the layers where they pay, and a report.

    Looked at are ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding``, the projections of ``nn.MultiheadAttention``, and
    transformers' ``Conv1D``. Every other layer stays, and so does one of these where the report says why. Weights that
    layers share stay shared. The model is calibrated in evaluation mode; the copy has the modes of the model, which is
    not modified.

    Each weight is replaced by the factors that cost the *output of the model* least, to first order, by statistics of
    the layer's inputs and of the gradients of the output; ranks go where they save most of that error for their cost
    (see ``byol_fast/compression/statistics.py``, ``factorize.py`` and ``yields.py``). For several budgets, a
    :class:`byol_fast.compression.Analysis` calibrates once.

    Args:
        model: any model, trained.
        calibration: a few batches as in use: a tensor or array of rows, or an iterable of batches, such as a list or a
            DataLoader. A batch that is a tuple or list holds positional arguments of the model, a mapping keyword
            arguments. Hundreds of samples do. None, with ``method="svd"`` and ``gate="none"``, uses no data.
        keep: share of the weights of the layers that can be replaced that may be left; 0.5 if neither ``error`` nor
            ``latency`` is given.
        error: the largest ‖f − f′‖ / ‖f‖ of the model's output over the calibration data, before recovery; the smallest
            model that keeps it is looked for.
        latency: milliseconds that a batch like the first may take; ranks are then given by error per millisecond.
        method: ``"data_aware"``, or ``"svd"`` for the plain truncated SVD of each weight.
        allocation: ``"measured"``: ranks by the estimate described, corrected by what each layer alone is measured to
            cost, which takes a forward pass of two batches a layer; ``"output"``: by the estimate as it is;
            ``"uniform"``: the same share of each layer, as always with ``method="svd"``.
        sequential: fit each layer again, to the dense layer's outputs, on the inputs that it gets in the compressed
            model, in the order of calls; costs two passes over the data for each layer or group of layers with one
            input.
        gate: ``"latency"``: a layer is replaced only where its bottleneck measures faster on this machine, at the first
            batch's shape, dtype and autocast; and the whole only if it measures faster. ``"none"``: no time is taken.
        margin: of its time that a layer has to save, to pass the gate.
        include, exclude: names of modules (each means everything inside of it) or a predicate ``(name, module)``.
        forward: ``forward(model, batch)`` → what counts of the output; by default, all floating-point tensors that the
            model returns.
        batch_size: rows of a batch where ``calibration`` is a tensor or array.
        recovery: a :class:`byol_fast.Recovery`; None means no training.
        seed: of the random directions of the gradients.
        progress: show progress where training takes time.

    Returns:
        The compressed copy and a :class:`byol_fast.CompressionReport`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    # Before the calibration, which takes its time.
    check_goal(calibration, keep, error, latency, allocation, gate)
    analysis = Analysis(
        model,
        calibration,
        method=method,
        sequential=sequential,
        gate=gate,
        margin=margin,
        include=include,
        exclude=exclude,
        forward=forward,
        batch_size=batch_size,
        seed=seed,
    )
    return analysis.compress(
        keep=keep, error=error, latency=latency, allocation=allocation, recovery=recovery, progress=progress
    )
