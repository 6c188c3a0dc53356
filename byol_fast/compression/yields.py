"""What each bottleneck costs the output of the model, measured: ranks are given again by it.

``factorize`` estimates the cost of a rank to first order, as if the errors of rows and of layers were independent. They
are not: those of the tokens that are averaged into one embedding add up. So each layer alone is made dense again, in
the model as it would be compressed, and what that saves of the output's error tells by which factor the estimates of
this layer are wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..nn.replace import set_module
from .build import Workpiece
from .calibration import Calibration
from .find import Site
from .kinds import Factors

__all__ = ["Yields"]

# Batches that are measured by, evenly spread over the calibration data: a ranking of layers needs few.
_BATCHES = 2
# Of a factor: what one layer saves alone is a rough guide to what another rank of it would.
_BOUNDS = (0.2, 5.0)


class Yields:
    """Squared errors of outputs, measured on a few batches.

    Args:
        work: the model.
        calibration: where batches are taken from.
    """

    @torch.no_grad()
    def __init__(self, work: Workpiece, calibration: Calibration) -> None:
        self.work = work
        self.calibration = calibration
        batches = list(calibration)
        count = min(_BATCHES, len(batches))
        self.batches = [batches[(2 * index + 1) * len(batches) // (2 * count)] for index in range(count)]
        self.outputs = [calibration.forward(work.dense, batch) for batch in self.batches]

    def error(self, cuts: Mapping[Site, Factors]) -> float:
        """Σ ‖f − f′‖² of the model with these factors."""
        return self._error(self.work.build(cuts)[0])

    @torch.no_grad()
    def _error(self, model: nn.Module) -> float:
        return sum(
            float((self.calibration.forward(model, batch).double() - expected.double()).square().sum())
            for batch, expected in zip(self.batches, self.outputs, strict=True)
        )

    def corrections(self, cuts: Mapping[Site, Factors], estimates: Mapping[Site, float]) -> dict[Site, float]:
        """By what to multiply the estimated costs of each site, relative to those of the others."""
        model, places = self.work.build(cuts)
        error = self._error(model)
        saved = {}
        for (site, _), place in zip(cuts.items(), places, strict=True):
            pairs = list(zip(place.modules, site.modules, strict=True))
            for bottleneck, dense in pairs:
                set_module(model, bottleneck, dense)
            saved[site] = max(error - self._error(model), 0.0)
            for bottleneck, dense in pairs:
                set_module(model, dense, bottleneck)
        total = sum(saved.values()) / max(sum(estimates[site] for site in cuts), torch.finfo(torch.float64).tiny)
        if not total > 0:
            return {}
        low, high = _BOUNDS
        tiny = torch.finfo(torch.float64).tiny
        return {site: min(max(saved[site] / max(total * estimates[site], tiny), low), high) for site in cuts}
