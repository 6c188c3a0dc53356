"""Each layer fitted once more, to the dense layer's outputs y, on the inputs x̃ that it gets in the compressed model.

Reduced-rank regression: with the row weights w of ``statistics``, means ν and μ, and sums in float64::

    A = Σ w (x̃ − μ)(x̃ − μ)ᵀ,   B = Σ w (y − ν)(x̃ − μ)ᵀ,   W* = (B + λ W)(A + λ 1)⁻¹

W* is then cut to its rank in the same way as a weight, and the bias is ν − W′ μ. So a layer makes up for what the
layers before it lost. The ridge λ leads to the trained weight where the data do not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .factorize import decompose
from .find import Site
from .kinds import Factors
from .statistics import Statistics, hooked

__all__ = ["refit"]

# Of the mean variance of an input.
_RIDGE = 1e-2


def refit(
    dense: nn.Module,
    cuts: Mapping[Site, Factors],
    statistics: Mapping[Site, Statistics],
    calibration: Calibration,
    build: Callable[[Mapping[Site, Factors]], tuple[nn.Module, list[Site]]],
) -> dict[Site, Factors]:
    """Fit the factors of each stage of sites in turn.

    Args:
        dense: the model with its dense layers.
        cuts: the factors of each site to begin with.
        statistics: with the rows' weights.
        calibration: the same data.
        build: makes the model with given factors, and tells the bottlenecks' places in it, in the order of ``cuts``.
    """
    cuts = dict(cuts)
    for stage in sorted({statistics[site].stage for site in cuts}):
        # An embedding's inputs are what they were.
        sites = [s for s in cuts if statistics[s].stage == stage and s.kind.title != "Embedding"]
        if not sites:
            continue
        model, places = build(cuts)
        at = {site: place for site, place in zip(cuts, places, strict=True) if site in sites}
        sums = {site: _Sums(site, statistics[site]) for site in sites}
        _pass(dense, model, at, sums, calibration)
        for site in sites:
            cuts[site] = sums[site].solve(cuts[site].rank)
    return cuts


@torch.no_grad()
def _pass(
    dense: nn.Module, model: nn.Module, at: dict[Site, Site], sums: dict[Site, _Sums], calibration: Calibration
) -> None:
    originals = {place: site for site, place in at.items()}
    outputs: dict[Site, list[Tensor]] = {}

    def remember(site: Site, module: nn.Module, input: Tensor, output: Tensor) -> None:
        outputs.setdefault(site, []).append(site.kind.outputs(module, output))

    def add(place: Site, module: nn.Module, input: Tensor, output: Tensor) -> None:
        site = originals[place]
        # Bias and shape of patches are those of the dense layer.
        original = site.modules[place.modules.index(module)]
        sums[site].add(site.kind.rows(original, input), outputs[site].pop(0), original)

    for batch in calibration:
        outputs.clear()
        with hooked(list(at), remember):
            calibration.forward(dense, batch)
        with hooked(list(at.values()), add):
            calibration.forward(model, batch)


class _Sums:
    def __init__(self, site: Site, known: Statistics) -> None:
        self.site = site
        self.known = known
        # The covariance of the inputs adds up as before; what is new is the product with the outputs.
        self.inputs = Statistics(site)
        self.matrix = site.matrix.double()
        self.cross = torch.zeros_like(self.matrix)
        self.outputs = torch.zeros_like(self.matrix[..., 0])
        self.number = 0

    def add(self, rows: Tensor, outputs: Tensor, module: nn.Module) -> None:
        weights = self.known.weights_of(self.number)
        self.number += 1
        bias: Any = module.bias
        outputs = outputs.to(weights.dtype)
        if bias is not None:
            outputs = outputs - bias.to(weights.dtype).reshape(outputs.shape[1:])
        centered = self.inputs.add_weighted(rows.to(weights.dtype), weights)
        weighted = outputs * weights[..., None]
        self.outputs += weighted.sum(dim=0, dtype=torch.float64)
        self.cross += torch.einsum("ngo,ngi->goi", weighted, centered)

    def solve(self, rank: int) -> Factors:
        covariance, center = self.inputs.moments()
        total = self.inputs.weight.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        mean = self.outputs / total
        relative = center if self.inputs.origin is None else center - self.inputs.origin.double()
        cross = self.cross / total[..., None] - mean[..., None] * relative[:, None]
        ridge = _RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        best = torch.linalg.solve(covariance + ridge * identity, cross + ridge * self.matrix, left=False)
        self.inputs.importance = self.known.importance
        cut = decompose(best, self.inputs).cut(rank)
        # The cut made up for the mean of W* − W′; what is wanted is that of the outputs, without the bias.
        if cut.shift is not None:
            cut.shift = cut.shift + (mean - (best @ center[..., None])[..., 0]).flatten()
        return cut
