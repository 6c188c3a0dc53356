"""The best factors of a layer of every rank, and what each rank costs the output of the model.

With the importance G and the covariance S of ``statistics``, the weight W′ of rank k that minimises
tr(G (W − W′) S (W − W′)ᵀ) is ``R⁻¹ U Uᵀ R W`` where R = G^½ and U are the k leading eigenvectors of R W S Wᵀ R, and it
costs the sum of the other eigenvalues. (Without G, this is principal components of the outputs; without S too, the
truncated SVD.) The bias makes up for the mean of the error, (W − W′) μ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kinds import Factors
from .statistics import Statistics

__all__ = ["Decomposition", "decompose"]

# Of the mean importance of an output: what directions count whose gradients calibration has not seen.
_DAMPING = 1e-2


class Decomposition:
    """Factors of all ranks: those of rank k are the first k units.

    Attributes:
        costs: ``[max_rank + 1]``: what ranks 0 … max_rank cost of ‖f‖², by the first-order estimate.
        kept: ``[max_rank + 1]``: share of the output's energy each rank keeps, errors weighted as they matter.
    """

    def __init__(
        self,
        values: Tensor,
        encoder: Tensor,
        decoder: Tensor,
        mean_code: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        self.encoder = encoder
        self.decoder = decoder
        # Of an embedding, μ is as long as its table; W μ and its code are short.
        self.mean_code = mean_code
        self.mean = mean
        energies = values.clamp(min=0).sum(dim=0)
        # Added up from the smallest, so that what is left at high ranks keeps its digits.
        tails = torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1))).cpu()
        self.costs = tails
        self.kept = 1 - tails / tails[0] if tails[0] > 0 else torch.ones_like(tails)

    def cut(self, rank: int) -> Factors:
        """The best factors of this rank; each unit has encoder and decoder weights of equal norm."""
        encoder, decoder = self.encoder[:, :rank], self.decoder[:, :, :rank]
        shift = None
        if self.mean is not None and self.mean_code is not None:
            shift = (self.mean - (decoder @ self.mean_code[:, :rank, None])[..., 0]).flatten()
        ratio = torch.linalg.vector_norm(encoder, dim=2) / torch.linalg.vector_norm(decoder, dim=1)
        scale = torch.where((ratio > 0) & torch.isfinite(ratio), ratio, 1.0).sqrt()
        return Factors(encoder / scale[..., None], decoder * scale[:, None], shift)


def decompose(matrix: Tensor, statistics: Statistics | None) -> Decomposition:
    """Decompose ``[groups, o, d]`` matrices; without statistics, by plain truncated SVD."""
    matrix = matrix.double()
    rank = min(matrix.shape[1:])
    if statistics is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return Decomposition(values.square(), values[..., None] * right, left)
    covariance, mean = statistics.image(matrix)
    root, inverse = _roots(statistics.importance)
    core = root @ covariance @ root
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    values, vectors = values.flip(-1)[:, :rank], vectors.flip(-1)[:, :, :rank]
    projection = vectors.mT @ root
    return Decomposition(values, projection @ matrix, inverse @ vectors, (projection @ mean[..., None])[..., 0], mean)


def _roots(importance: Tensor) -> tuple[Tensor, Tensor]:
    """G^½ and G^−½ of the damped importance; of none at all, the identity."""
    scale = importance.diagonal(dim1=1, dim2=2).mean(dim=1)
    identity = torch.eye(importance.shape[-1], dtype=importance.dtype, device=importance.device)
    damping = torch.where(scale > 0, _DAMPING * scale, 1.0)
    values, axes = torch.linalg.eigh(importance + damping[:, None, None] * identity)
    roots = values.sqrt()
    return (axes * roots[:, None]) @ axes.mT, (axes / roots[:, None]) @ axes.mT
