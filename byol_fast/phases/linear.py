"""What is known in closed form of a linear bottleneck, and where a non-linear one starts.

Formulas: "The linear bottleneck is PCA" (Eckart and Young, 1936), and ridge regression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn import Bottleneck
from ..pca import StreamingPCA
from . import processes
from .batches import Batches

__all__ = [
    "alternate_",
    "best_loss",
    "has_certificate",
    "principal_components",
    "set_optimum_",
    "start_at_optimum_",
]

# Keeps singular Gram matrices solvable; relative to their mean eigenvalue.
_RIDGE = 1e-10
# Units that rarely switch off, and whose decoder a stronger ridge keeps small where they do.
_SHIFT = 3.0
_NEAR_ZERO = 0.3
_WARM_RIDGE = 1e-6


def principal_components(module: Bottleneck, batches: Batches, progress: bool) -> StreamingPCA:
    """The principal components of all rows in all processes, from one pass; from two where the features are many."""
    pca = _nothing_read(module)
    _read(pca, batches, progress)
    if not _has_covariance(pca):
        pca = pca.next_pass()
        _read(pca, batches, progress)
    return pca


def has_certificate(module: Bottleneck) -> bool:
    """Whether the features are few enough for their covariance, which a certificate needs."""
    return _has_covariance(_nothing_read(module))


def _nothing_read(module: Bottleneck) -> StreamingPCA:
    features, device = module.in_features, module.encoder.weight.device
    pca = StreamingPCA(features, rank=min(module.rank, features), device=device)
    # A certificate needs the eigenvalues that are left, too.
    return StreamingPCA(features, device=device) if _has_covariance(pca) else pca


def _has_covariance(pca: StreamingPCA) -> bool:
    return pca.explain().method == "covariance"


def _read(pca: StreamingPCA, batches: Batches, progress: bool) -> None:
    # Here, so that the package needs nothing but torch and numpy to be imported.
    from tqdm import tqdm

    hidden = True if not progress or processes.rank() else None
    with tqdm(total=batches.identity().get("rows"), desc="covariance", unit="row", disable=hidden) as bar:
        for batch in batches.in_order():
            rows = batch.tensors[0]
            if batch.rows:
                pca.partial_fit(rows if rows.layout == torch.sparse_csr else rows.reshape(-1, rows.shape[-1]))
            bar.update(batch.rows * processes.size())
    with processes.guarded():
        pca.all_reduce()


def best_loss(module: Bottleneck, pca: StreamingPCA) -> float:
    """The smallest possible loss of a linear bottleneck of this rank."""
    curve = pca.curve(centered=module.encoder.bias is not None)
    return curve.error_at(min(module.rank, module.in_features))


def _axes(module: Bottleneck, pca: StreamingPCA) -> Tensor:
    """Principal axes ``[rank, in_features]``; units beyond the number of features have nothing to do."""
    axes = pca.mean_.new_zeros(module.rank, module.in_features)
    known = min(module.rank, module.in_features)
    axes[:known] = pca.components(known, centered=module.encoder.bias is not None)
    return axes


@torch.no_grad()
def set_optimum_(module: Bottleneck, pca: StreamingPCA) -> None:
    """Set a linear bottleneck to its optimum."""
    axes = _axes(module, pca)
    module.assign_(axes, axes.T, -axes @ pca.mean_, pca.mean_)


@torch.no_grad()
def alternate_(module: Bottleneck, pca: StreamingPCA) -> None:
    """One round for a linear bottleneck: the best decoder for its encoder, then the best encoder for that decoder.

    With C the covariance (the second moment, without biases), ``Wd = C Weᵀ (We C Weᵀ)⁻¹`` and ``We = (WdᵀWd)⁻¹ Wdᵀ``.
    """
    encoder = module.factors("alternate")[0].to(pca.device)
    mean = pca.mean_
    image = encoder @ _second_moment(pca, centered=module.encoder.bias is not None)
    decoder = _solve(image @ encoder.T, image, _RIDGE).T
    encoder = _solve(decoder.T @ decoder, decoder.T, _RIDGE)
    module.assign_(encoder, decoder, -encoder @ mean, mean)


def _solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``(gram + λ I)⁻¹ right``, λ relative to the mean eigenvalue; 0 where everything is."""
    mean_eigenvalue = float(gram.diagonal().mean())
    shifted = gram.clone()
    shifted.diagonal().add_(ridge * mean_eigenvalue if mean_eigenvalue > 0 else 1.0)
    solution: Tensor = torch.linalg.solve(shifted, right)
    return solution


@torch.no_grad()
def start_at_optimum_(module: Bottleneck, pca: StreamingPCA, batches: Batches) -> None:
    """Start a non-linear bottleneck close to the best linear one.

    The encoder holds the principal axes, where the activation is nearly linear: three standard deviations up for those
    that are the identity there, near 0 for tanh. The decoder is then the exact (ridge) least-squares one for the codes
    that this encoder makes, activation included.
    """
    axes, mean = _axes(module, pca), pca.mean_
    deviation = axes.new_zeros(module.rank)
    known = min(module.rank, module.in_features)
    deviation[:known] = pca.explained_variance_[:known].sqrt()
    if module.activation == "tanh":
        shift = torch.zeros_like(deviation)
        scale = 1.0 if module.tied else min(1.0, _NEAR_ZERO / max(float(deviation.max()), 1e-30))
    else:
        shift, scale = _SHIFT * deviation, 1.0
    if module.encoder.bias is None:
        shift = torch.zeros_like(shift)
    module.assign_(scale * axes, axes.T, shift - scale * axes @ mean, mean - axes.T @ shift)
    if not module.tied and _has_covariance(pca):
        _fit_decoder_(module, batches)


def _fit_decoder_(module: Bottleneck, batches: Batches) -> None:
    """The least-squares decoder for the codes of this encoder, from the joint covariance of codes and rows."""
    biased, rank = module.encoder.bias is not None, module.rank
    joint = StreamingPCA(rank + module.in_features, method="covariance", device=module.encoder.weight.device)
    for batch in batches.in_order():
        if batch.rows:
            rows = batch.tensors[0].to(joint.device, module.encoder.weight.dtype).to_dense()
            rows = rows.reshape(-1, module.in_features)
            joint.partial_fit(torch.cat((module.encode(rows), rows), dim=1))
    with processes.guarded():
        joint.all_reduce()
    moment, mean = _second_moment(joint, biased), joint.mean_
    decoder = _solve(moment[:rank, :rank], moment[:rank, rank:], _WARM_RIDGE).T
    module.assign_(module.encoder.weight, decoder, None, mean[rank:] - decoder @ mean[:rank])


def _second_moment(pca: StreamingPCA, centered: bool) -> Tensor:
    count = pca.n_samples_seen_
    covariance = pca.covariance_ * ((count - 1) / count)
    return covariance if centered else covariance + torch.outer(pca.mean_, pca.mean_)
