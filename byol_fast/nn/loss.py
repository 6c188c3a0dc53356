"""Losses as layers."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional

__all__ = ["MSELoss"]


class MSELoss(nn.Module):
    """Mean squared error: a drop-in replacement of :class:`torch.nn.MSELoss`, run by :func:`byol_fast.mse_loss`.

    Args:
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
