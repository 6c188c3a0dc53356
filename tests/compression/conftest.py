"""Time, where a test wants the gate but no clock: a layer takes as long as it has weights."""

import pytest
import torch

import byol_fast.compression.analysis
import byol_fast.compression.gate


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds of a layer: a thousandth of its weights, and ``clock.call`` for each call of a part."""

    class Clock:
        call = 0.0

        def times(self, site, call, rank):
            return site.size / 1e3 + self.call, rank * site.unit / 1e3 + 2 * self.call

    clock = Clock()
    monkeypatch.setattr(byol_fast.compression.gate, "_times", clock.times)

    def of_models(data, *models):
        return [sum(p.numel() for p in model.parameters()) / 1e3 for model in models]

    monkeypatch.setattr(byol_fast.compression.analysis, "milliseconds", of_models)
    return clock


@pytest.fixture
def low_rank_rows():
    """Rows ``[200, 24]`` that lie, but for a little, in a plane of 6 dimensions, far from the origin."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(6, 24, generator=generator)
    noise = 0.01 * torch.randn(200, 24, generator=generator)
    return torch.randn(200, 6, generator=generator) @ basis + noise + 3
