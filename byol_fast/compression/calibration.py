"""Calibration data: batches, how a model is called on one, and what of its output counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Calibration", "output_error"]


class Calibration:
    """Batches that can be gone through again, on the model's device.

    Args:
        data: see :func:`byol_fast.compress`.
        batch_size: rows of a batch, where ``data`` is one tensor or array.
        forward: see :func:`byol_fast.compress`.

    Raises:
        TypeError: ``data`` is something else.
        ValueError: it has no batch.
    """

    def __init__(
        self, data: Any, batch_size: int, forward: Callable[[nn.Module, Any], Any] | None, device: torch.device
    ) -> None:
        if isinstance(data, np.ndarray):
            data = torch.from_numpy(data)
        if isinstance(data, Tensor):
            data = data.split(batch_size)
        elif isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
            raise TypeError(
                f"calibration: expected a tensor, an array or an iterable of batches, got {type(data).__name__}"
            )
        elif isinstance(data, Iterator):
            # It can be gone through only once.
            data = list(data)
        self.data: Iterable[Any] = data
        self.device = device
        self._forward = forward
        self._batch_size = batch_size
        if next(iter(self), None) is None:
            raise ValueError("calibration: expected at least one batch, got none")

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            yield pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self.device), batch)

    def like(self, data: Any) -> Calibration:
        """Other data, used alike."""
        return Calibration(data, self._batch_size, self._forward, self.device)

    def first(self) -> Any:
        """The first batch."""
        return next(iter(self))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """The part of the model's output that counts, as a vector or a tensor.

        Raises:
            TypeError: the output has no floating-point tensor.
        """
        if self._forward is not None:
            output = self._forward(model, batch)
        elif isinstance(batch, Mapping):
            output = model(**batch)
        elif isinstance(batch, (tuple, list)):
            output = model(*batch)
        else:
            output = model(batch)
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not tensors:
            raise TypeError(f"model: expected an output with floating-point tensors, got {type(output).__name__}")
        return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])


@torch.no_grad()
def output_error(calibration: Calibration, dense: nn.Module, model: nn.Module) -> float:
    """‖f − f′‖ / ‖f‖ over all batches."""
    sums = [0.0, 0.0]
    for batch in calibration:
        expected = calibration.forward(dense, batch).double()
        sums[0] += float((calibration.forward(model, batch).double() - expected).square().sum())
        sums[1] += float(expected.square().sum())
    return math.sqrt(sums[0] / sums[1] if sums[1] > 0 else sums[0])
