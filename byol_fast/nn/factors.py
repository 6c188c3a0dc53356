"""The linear algebra of low-rank layers: the best two factors of a weight, in principal order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..svd import fixed_signs, truncated_svd

__all__ = [
    "canonical_factors",
    "checked_covariance",
    "checked_mean",
    "checked_size",
    "orthogonal_",
    "principal_factors",
    "principal_rotation",
]


def checked_size(name: str, size: int) -> int:
    if not isinstance(size, int):
        raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name}: expected an integer ≥ 1, got {size}")
    return size


def orthogonal_(weight: Tensor) -> None:
    """Orthonormal rows, or columns if there are fewer; in float32 at least, because QR has no half precision."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=dtype)))


def checked_covariance(covariance: Tensor | None, weight: Tensor) -> Tensor | None:
    features = weight.shape[1]
    if covariance is not None and covariance.shape != (features, features):
        raise ValueError(
            f"covariance: expected shape [in_features, in_features] = [{features}, {features}], "
            f"got {list(covariance.shape)}"
        )
    if covariance is not None and not torch.isfinite(covariance).all():
        raise ValueError("covariance: expected finite numbers, got NaN or Inf")
    return None if covariance is None else covariance.to(weight.device, torch.float64)


def checked_mean(mean: Tensor, weight: Tensor) -> Tensor:
    if mean.shape != weight.shape[1:]:
        raise ValueError(f"mean: expected shape [in_features] = [{weight.shape[1]}], got {list(mean.shape)}")
    return mean.to(weight.device, torch.float64)


def principal_factors(weight: Tensor, rank: int, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best encoder ``[rank, n]`` and decoder ``[m, rank]`` for ``weight`` ``[m, n]``, in principal order."""
    on_data = weight if covariance is None else weight @ square_root(covariance)
    decoder = truncated_svd(on_data, rank, method="covariance").U
    encoder = decoder.T @ weight
    # Halves of each unit's magnitude go to either side; a unit that carries nothing is zero on both.
    magnitude = torch.linalg.vector_norm(encoder, dim=1)
    scale = fixed_signs(encoder) * magnitude.sqrt()
    inverse = torch.where(magnitude > 0, 1 / scale, 0.0)
    return encoder * inverse[:, None], decoder * scale


def canonical_factors(encoder: Tensor, decoder: Tensor, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors of the same product and shapes in principal order."""
    orthonormal, triangular = torch.linalg.qr(decoder)
    core = triangular @ encoder
    rank = min(core.shape)
    new_encoder, new_decoder = torch.zeros_like(encoder), torch.zeros_like(decoder)
    # A rank above the sizes leaves units with nothing to carry.
    new_encoder[:rank], core_decoder = principal_factors(core, rank, covariance)
    new_decoder[:, :rank] = orthonormal @ core_decoder
    return new_encoder, new_decoder


def principal_rotation(encoder: Tensor, covariance: Tensor | None) -> Tensor:
    """The orthogonal matrix that makes the code of this encoder uncorrelated and descending in variance."""
    code_covariance = encoder @ encoder.T if covariance is None else encoder @ covariance @ encoder.T
    _, axes = torch.linalg.eigh(code_covariance)
    rotation: Tensor = axes.flip(1).T
    return rotation * fixed_signs(rotation @ encoder)[:, None]


def square_root(covariance: Tensor) -> Tensor:
    """S with S Sᵀ = covariance. The floor decides among directions the inputs never took: there, all count the same."""
    values, axes = torch.linalg.eigh(covariance)
    floor = 1e-10 * values[-1].clamp(min=0)
    root: Tensor = axes * values.maximum(floor).sqrt()
    return root
