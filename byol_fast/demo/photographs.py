"""scikit-learn's two sample photographs, cut into overlapping patches, compressed and rebuilt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import Bottleneck
from ..phases import pretrain
from .extras import required
from .figure import Panel
from .ranks import curve_of, result_at

__all__ = ["run"]

_PATCH = 16
_STEP = 4


def run(ranks: Sequence[int], quick: bool) -> Panel:
    """Pre-train at each rank, rebuild the photographs, and see how far gradients alone get."""
    images = _photographs()
    patches = _patches(images)
    print(f"\nphotographs: {len(patches)} patches of {_PATCH}×{_PATCH}×3 = {patches.shape[1]} numbers")
    fitted = patches[::8] if quick else patches
    curve = curve_of(fitted)
    results, pictures = [], {"original": images}
    for rank in ranks:
        result, layer = result_at("photographs", fitted, rank, curve)
        results.append(result)
        pictures[f"rank {rank}: {result.yielded:.1%}"] = _rebuilt(layer, patches, images.shape)
    _train_by_gradients(fitted, ranks[len(ranks) // 2])
    return Panel("photographs", curve, results, pictures)


def _train_by_gradients(patches: Tensor, rank: int) -> None:
    """What Adam reaches from a random start, and how far that is from the best."""
    layer = Bottleneck(patches.shape[1], rank)
    outcome = pretrain(layer, patches, method="joint", epochs=5)
    print(
        f"  rank {rank:4} by Adam, 5 epochs from a random start: loss is {outcome.certificate:.3f} × the best possible"
    )


def _photographs() -> Tensor:
    """Both photographs, ``[2, 3, 424, 640]``, numbers in 0 … 1, cut to what whole steps of the patches reach."""
    datasets = required("sklearn.datasets", "scikit-learn")
    required("PIL", "pillow")
    images = [torch.from_numpy(image.copy()) for image in datasets.load_sample_images().images]
    stacked = torch.stack(images).permute(0, 3, 1, 2).float() / 255
    height, width = (size - (size - _PATCH) % _STEP for size in stacked.shape[2:])
    return stacked[:, :, :height, :width]


def _patches(images: Tensor) -> Tensor:
    """Overlapping patches as rows, ``[2·positions, 16·16·3]``."""
    columns = F.unfold(images, _PATCH, stride=_STEP)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1]).contiguous()


@torch.no_grad()
def _rebuilt(layer: Bottleneck, patches: Tensor, shape: torch.Size) -> Tensor:
    """The photographs from their codes; overlapping patches are averaged."""
    codes = layer.encode(patches)
    columns = layer.decode(codes).reshape(shape[0], -1, patches.shape[1]).transpose(1, 2)
    size = (shape[2], shape[3])
    summed = F.fold(columns, size, _PATCH, stride=_STEP)
    counts = F.fold(torch.ones_like(columns), size, _PATCH, stride=_STEP)
    return (summed / counts).clamp(0, 1)
