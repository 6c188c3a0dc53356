"""What a user could write in PyTorch instead: the baselines.

Symbols as in the package: X [N, D] input, We, be encoder, Wd, bd decoder (None: tied, Wd = Weᵀ), U = X Weᵀ + be the
code of a linear bottleneck, R = U Wdᵀ + bd − X the residual, L = ‖R‖²/(N·D) the loss. ``loss`` and ``bottleneck`` are
left to autograd; ``chunked`` and ``gram`` return the loss and, if asked, the gradients of all weights and biases by
hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bottleneck(
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None = None,
    encoder_bias: Tensor | None = None,
    decoder_bias: Tensor | None = None,
) -> Tensor:
    """Two linear layers."""
    decoder = encoder_weight.t() if decoder_weight is None else decoder_weight
    return F.linear(F.linear(input, encoder_weight, encoder_bias), decoder, decoder_bias)


def loss(input: Tensor, **weights: Tensor) -> Tensor:
    """Two linear layers and their squared error. A sparse input is made dense, as is usual."""
    input = input.to_dense()
    return F.mse_loss(bottleneck(input, **weights), input)


def chunked(
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None = None,
    *,
    encoder_bias: Tensor,
    decoder_bias: Tensor,
    gradients: bool = True,
) -> list[Tensor]:
    """Chunks of rows that stay in cache, every large temporary reused in place.

    With E = R Wd: dWe = Eᵀ X, dWd = Rᵀ U, dbe = Σ E, dbd = Σ R, all times 2/(N·D). Sums over chunks are float32.
    """
    decoder = encoder_weight.t() if decoder_weight is None else decoder_weight
    d_encoder, d_decoder, d_encoder_bias, d_decoder_bias, total = (
        torch.zeros(shape, dtype=torch.float32)
        for shape in (encoder_weight.shape, decoder.shape, encoder_bias.shape, decoder_bias.shape, ())
    )
    for x in input.split(_chunk_rows(input)):
        code = F.linear(x, encoder_weight, encoder_bias)
        residual = F.linear(code, decoder, decoder_bias).sub_(x)
        total += torch.linalg.vector_norm(residual, dtype=torch.float32).square()
        if gradients:
            d_code = residual @ decoder
            _add_product(d_encoder, d_code.t(), x)
            _add_product(d_decoder, residual.t(), code)
            d_encoder_bias += d_code.sum(0)
            d_decoder_bias += residual.sum(0)
    if not gradients:
        return [(total / input.numel()).to(input.dtype)]
    return _finish(input, total, d_encoder, d_decoder, d_encoder_bias, d_decoder_bias, tied=decoder_weight is None)


def gram(
    input: Tensor,
    encoder_weight: Tensor,
    decoder_weight: Tensor | None = None,
    *,
    encoder_bias: Tensor,
    decoder_bias: Tensor,
    gradients: bool = True,
) -> list[Tensor]:
    """The reconstruction is never built; the input may be a sparse CSR matrix.

    With G = WdᵀWd, Q = (X − bd) Wd, E = U G − Q: N·D·L = ‖X − bd‖² + Σ U ⊙ (E − Q), dWe = Eᵀ X, dbe = Σ E,
    dWd = Wd (UᵀU) − XᵀU + bd (Σ u)ᵀ, dbd = Wd Σ u + N bd − Σ x, all times 2/(N·D). X takes part in two wide products.
    What is K wide is float32.
    """
    tied = decoder_weight is None
    we, be, bd = encoder_weight.float(), encoder_bias.float(), decoder_bias.float()
    wd = we.t() if tied else decoder_weight.float()
    rank, rows = encoder_weight.shape[0], input.shape[0]
    if tied:
        code = (input @ encoder_weight.t()).float()
        goal = code - bd @ wd
        code = code.add_(be)
    else:
        both = (input @ torch.cat([encoder_weight.t(), decoder_weight], 1)).float()
        code, goal = both[:, :rank] + be, both[:, rank:] - bd @ wd
    d_code = torch.addmm(goal, code, wd.t() @ wd, beta=-1)
    column_sums = _column_sums(input)
    energy = _squared_norm(input) - 2 * (column_sums @ bd) + rows * (bd @ bd)
    total = energy + (code * (d_code - goal)).sum()
    if not gradients:
        return [(total / input.numel()).to(input.dtype)]
    code_sum = code.sum(0)
    d_decoder = wd @ (code.t() @ code) + torch.outer(bd, code_sum)
    if tied:
        d_encoder = _transposed_product(input, d_code - code).t() + d_decoder.t()
    else:
        products = _transposed_product(input, torch.cat([d_code, code], 1))
        d_encoder, d_decoder = products[:, :rank].t(), d_decoder - products[:, rank:]
    d_decoder_bias = wd @ code_sum + rows * bd - column_sums
    return _finish(input, total, d_encoder, None if tied else d_decoder, d_code.sum(0), d_decoder_bias)


def _chunk_rows(input: Tensor) -> int:
    """About 2¹⁸ elements to a chunk: the fastest size, or near it, at all measured shapes."""
    return max(64, 2**18 // input.shape[1])


def _add_product(sum: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == sum.dtype:
        sum.addmm_(left, right)
    else:
        sum += left @ right


def _finish(
    input: Tensor, total: Tensor, d_encoder: Tensor, d_decoder: Tensor | None, *d_biases: Tensor, tied: bool = False
) -> list[Tensor]:
    """The mean, and gradients scaled and in the input's dtype, in the order of the weights."""
    if tied:
        d_encoder, d_decoder = d_encoder + d_decoder.t(), None
    scale = 2 / input.numel()
    weights = [gradient * scale for gradient in (d_encoder, d_decoder, *d_biases) if gradient is not None]
    return [result.to(input.dtype) for result in (total / input.numel(), *weights)]


def _squared_norm(input: Tensor) -> Tensor:
    stored = input.values() if input.layout == torch.sparse_csr else input
    return torch.linalg.vector_norm(stored, dtype=torch.float32).square()


def _column_sums(input: Tensor) -> Tensor:
    if input.layout == torch.sparse_csr:
        sums = torch.zeros(input.shape[1], dtype=input.dtype)
        return sums.index_add_(0, input.col_indices(), input.values())
    return input.sum(0, dtype=torch.float32)


def _transposed_product(input: Tensor, right: Tensor) -> Tensor:
    """inputᵀ right, float32 where PyTorch's product gives it."""
    if input.layout == torch.sparse_csr:
        return input.t().to_sparse_csr() @ right
    return (input.t() @ right.to(input.dtype)).float()
