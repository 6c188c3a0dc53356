"""The best factors of a layer of every rank, and what each rank costs the output of the model.

With the importance G and the covariance S of ``statistics``, the weight W′ of rank k that minimises
tr(G (W − W′) S (W − W′)ᵀ) is ``R⁻¹ U Uᵀ R W`` where RᵀR = G and U are the k leading eigenvectors of R W S Wᵀ Rᵀ, and it
costs the sum of the other eigenvalues. (Without G, this is principal components of the outputs; without S too, the
truncated SVD.) With S = T Tᵀ and V the k leading eigenvectors of Tᵀ Wᵀ G W T, it is ``W T V Vᵀ T⁻¹``, too. The bias
makes up for the mean of the error, (W − W′) μ.
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
    covariance, mean = statistics.damped_moments()
    root = _root(statistics.importance)
    # The products are of one spectrum: the smaller is decomposed, since that costs the cube of its size.
    if statistics.diagonal or matrix.shape[1] <= matrix.shape[2]:
        values, vectors = _leading(root @ _image(matrix, covariance, mean) @ root.mT, rank)
        encoder = vectors.mT @ root @ matrix
        decoder = torch.linalg.solve_triangular(root, vectors, upper=True)
    else:
        inputs, axes = torch.linalg.eigh(covariance)
        scale = inputs.clamp(min=torch.finfo(torch.float64).eps * inputs.amax(dim=-1, keepdim=True)).sqrt()
        outputs = matrix @ axes * scale[:, None]
        weighted = root @ outputs
        values, vectors = _leading(weighted.mT @ weighted, rank)
        encoder = vectors.mT @ (axes / scale[:, None]).mT
        decoder = outputs @ vectors
    return Decomposition(
        values, encoder, decoder, (encoder @ mean[..., None])[..., 0], (matrix @ mean[..., None])[..., 0]
    )


def _image(matrix: Tensor, covariance: Tensor, mean: Tensor) -> Tensor:
    """Covariance of ``matrix @ x``; that of indices is given by its diagonal ``[groups, 1, d]``, not yet centred."""
    if covariance.shape[-2] == matrix.shape[-1]:
        return matrix @ covariance @ matrix.mT
    center = matrix @ mean[..., None]
    return (matrix * covariance) @ matrix.mT - center @ center.mT


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return values.flip(-1)[:, :rank], vectors.flip(-1)[:, :, :rank]


def _root(importance: Tensor) -> Tensor:
    """An upper triangle R with RᵀR the damped importance; of none at all, the identity."""
    scale = importance.diagonal(dim1=1, dim2=2).mean(dim=1)
    identity = torch.eye(importance.shape[-1], dtype=importance.dtype, device=importance.device)
    damping = torch.where(scale > 0, _DAMPING * scale, 1.0)
    root: Tensor = torch.linalg.cholesky(importance + damping[:, None, None] * identity).mT
    return root
