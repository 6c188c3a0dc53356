"""What calibration tells of each layer: its inputs, and how much its outputs matter to the output of the model.

To first order, an error δ of a layer's output changes the model's output f by J δ. With a random v of independent
standard normal numbers, g = Jᵀ v has E (gᵀ δ)² = ‖J δ‖², so that one backward pass a batch tells what each row and each
direction of a layer's output is worth (Hutchinson's estimate of JᵀJ). Of a layer with inputs x, streaming sums keep::

    importance   G = Σ g gᵀ                  [o, o]
    covariance   S = Σ |g|² (x − μ)(x − μ)ᵀ / Σ |g|²,   μ = Σ |g|² x / Σ |g|²      [d, d], [d]

An error Δ of the weight then costs about tr(G Δ S Δᵀ) of ‖f‖², in units that are the same for all layers. Rows that do
not matter, such as padding, have g = 0 and do not count. (Kronecker factors as in Martens and Grosse, ICML 2015.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .find import Site

__all__ = ["Call", "Statistics", "hooked", "measure"]


@dataclass(frozen=True)
class Call:
    """How a layer was called first."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None


class Statistics:
    """Streaming sums of a site, in float64.

    Attributes:
        call: the first call; None while there was none.
        calls: how often the site was called in the first batch.
        stage: a number that rises with the order of first calls; sites that got the same tensor have the same.
    """

    def __init__(self, site: Site) -> None:
        matrix = site.matrix
        groups, outputs, inputs = matrix.shape
        self.diagonal = site.kind.title == "Embedding"
        self.call: Call | None = None
        self.calls = 0
        options: dict[str, Any] = {"dtype": torch.float64, "device": matrix.device}
        self.weight = torch.zeros(groups, **options)
        self.first = torch.zeros(groups, inputs, **options)
        # About a point near the mean, so that a large mean costs no digits. Indices have no products but counts.
        self.origin: Tensor | None = None
        self.second = torch.zeros(groups, *(() if self.diagonal else (inputs, inputs)), **options)
        self.importance = torch.zeros(groups, outputs, outputs, **options)
        self.stage = 0
        self.total_calls = 0
        self._row_weights: dict[int, Tensor] = {}

    def add(self, rows: Tensor, gradients: Tensor, number: int | None = None) -> None:
        """Add rows ``[N, groups, d]`` (or indices ``[N]``) and the gradients ``[N, groups, o]`` of their outputs.

        With the number of the call, the rows' weights are kept for :meth:`weights_of`.
        """
        gradients = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
        with torch.autocast(gradients.device.type, enabled=False):
            weights = gradients.square().sum(dim=-1)
            self.importance += torch.einsum("ngo,ngp->gop", gradients, gradients)
            if self.diagonal:
                self.weight += weights.sum(dim=0, dtype=torch.float64)
                self.first[0].index_add_(0, rows, weights[:, 0].double())
            else:
                self.add_weighted(rows.to(gradients.dtype), weights)
        if number is not None:
            self._row_weights[number] = weights

    def add_weighted(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Add rows with given weights ``[N, groups]``; returns the rows less ``origin``."""
        self.weight += weights.sum(dim=0, dtype=torch.float64)
        if self.origin is None:
            self.origin = rows.mean(dim=0)
        rows = rows - self.origin
        weighted = rows * weights[..., None]
        self.first += weighted.sum(dim=0, dtype=torch.float64)
        self.second += torch.einsum("ngi,ngj->gij", weighted, rows)
        return rows

    def weights_of(self, number: int) -> Tensor:
        """``[N, groups]``: how much each row of a call mattered; calls are numbered in the order of the forward."""
        return self._row_weights[number]

    def matters(self) -> bool:
        """Whether the output of the model was seen to depend on the site."""
        return bool((self.weight > 0).any())

    def is_finite(self) -> bool:
        """Whether no NaN or Inf was met."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in (self.first, self.second, self.importance))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Covariance ``[groups, d, d]`` and mean ``[groups, d]`` of the inputs; of an embedding, of shape ``[1, 1, d]``
        the diagonal of the second moment.
        """
        total = self.weight.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        center = self.first / total
        if self.diagonal:
            return center[:, None], center
        covariance = self.second / total[..., None] - center[..., None] * center[:, None]
        return covariance, center if self.origin is None else center + self.origin

    def damped_moments(self) -> tuple[Tensor, Tensor]:
        """The same, with a little variance in every direction: where calibration has not been, nothing else decides."""
        covariance, center = self.moments()
        if self.diagonal:
            return covariance.clamp(min=_DAMPING / covariance.shape[-1]), center
        variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)
        damping = torch.where(variance > 0, _DAMPING * variance, 1.0)
        identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        return covariance + damping[:, None, None] * identity, center


# Of the mean variance of an input: what directions count that calibration has not seen.
_DAMPING = 1e-6


@contextmanager
def hooked(sites: list[Site], hook: Callable[[Site, nn.Module, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``hook(site, module, input, output)`` after each call of a site; what it returns is the output then."""

    def call(site: Site) -> Callable[..., Tensor | None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Any:
            input = args[0] if args else next(iter(kwargs.values()))
            return hook(site, module, input, output)

        return after

    # Fast paths call no modules.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    handles = []
    try:
        for site in sites:
            handles += [module.register_forward_hook(call(site), with_kwargs=True) for module in site.modules]
        yield
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast)


def measure(
    sites: list[Site],
    batches: Callable[[], Iterator[Any]],
    forward: Callable[[Any], Tensor],
    seed: int,
    keep_row_weights: bool = False,
) -> dict[Site, Statistics]:
    """One pass forward and backward over the calibration batches.

    Raises:
        ValueError: an input or a gradient is NaN or Inf; the message names the layer.
    """
    statistics = {site: Statistics(site) for site in sites}
    stage: tuple[int, Tensor | None] = (0, None)

    def hook(site: Site, module: nn.Module, input: Tensor, output: Tensor) -> Tensor:
        nonlocal stage
        found = statistics[site]
        if found.call is None:
            device = output.device.type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            found.call = Call(input.shape, input.dtype, input.device, autocast)
            stage = stage if input is stage[1] else (stage[0] + 1, input)
            found.stage = stage[0]
        if first_batch:
            found.calls += 1
        number = found.total_calls if keep_row_weights else None
        found.total_calls += 1
        rows = site.kind.rows(module, input.detach())
        # Adding a zero that wants a gradient makes the graph begin here, also of a model that is frozen.
        tapped = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        if tapped.requires_grad:

            def add(gradient: Tensor | None) -> None:
                # Operations without a derivative, such as quantised ones, pass None.
                if gradient is not None:
                    found.add(rows, site.kind.outputs(module, gradient), number)

            tapped.register_hook(add)
        else:
            # The model computes this without gradients: all rows and all directions count the same.
            found.add(rows, torch.randn_like(site.kind.outputs(module, tapped)), number)
        return tapped

    first_batch = True
    devices = sorted({site.matrix.device.index or 0 for site in sites if site.matrix.device.type == "cuda"})
    with torch.random.fork_rng(devices), hooked(sites, hook), torch.inference_mode(False), torch.enable_grad():
        for index, batch in enumerate(batches()):
            torch.manual_seed(seed + index)
            output = forward(batch)
            if output.requires_grad:
                output.backward(torch.randn(output.shape, dtype=output.dtype).to(output.device))
            first_batch = False
    for site, found in statistics.items():
        if not found.is_finite():
            raise ValueError(f"calibration: expected finite numbers, got NaN or Inf at {site.name}")
    return statistics
