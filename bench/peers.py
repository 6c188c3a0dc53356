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
        for shape in (encoder_weight.shape, decoder.t().shape, encoder_bias.shape, decoder_bias.shape, ())
    )
    # About 2²⁰ elements to a chunk: the fastest size, or near it, at all measured shapes.
    chunks = input.split(max(64, 2**20 // input.shape[1]))
    buffer = torch.empty_like(chunks[0])
    for x in chunks:
        code = F.linear(x, encoder_weight, encoder_bias)
        residual = torch.addmm(decoder_bias, code, decoder.t(), out=buffer[: x.shape[0]]).sub_(x)
        total += _squared_norm(residual)
        if gradients:
            d_code = residual @ decoder
            _add_product(d_encoder, d_code.t(), x)
            # Transposed, for PyTorch is faster at few rows than at few columns.
            _add_product(d_decoder, code.t(), residual)
            d_encoder_bias += d_code.sum(0)
            d_decoder_bias += residual.sum(0)
    if not gradients:
        return [(total / input.numel()).to(input.dtype)]
    d_weights = [d_encoder + d_decoder] if decoder_weight is None else [d_encoder, d_decoder.t()]
    return _finish(input, total, *d_weights, d_encoder_bias, d_decoder_bias)


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
    d_decoder = torch.addmm(torch.outer(code_sum, bd), code.t() @ code, wd.t())
    if tied:
        d_weights = [d_decoder + _times_input((d_code - code).t(), input)]
    else:
        products = _times_input(torch.cat([d_code, code], 1).t(), input)
        d_weights = [products[:rank], (d_decoder - products[rank:]).t()]
    d_decoder_bias = wd @ code_sum + rows * bd - column_sums
    return _finish(input, total, *d_weights, d_code.sum(0), d_decoder_bias)


def _add_product(sum: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == sum.dtype:
        sum.addmm_(left, right)
    else:
        sum += left @ right


def _finish(input: Tensor, total: Tensor, *gradients: Tensor) -> list[Tensor]:
    """The mean and its gradients in the input's dtype."""
    scale = 2 / input.numel()
    return [result.to(input.dtype) for result in (total / input.numel(), *(scale * each for each in gradients))]


def _squared_norm(input: Tensor) -> Tensor:
    if input.layout == torch.sparse_csr:
        return torch.linalg.vector_norm(input.values()).square()
    # Row by row: over all elements at once, float32 loses four digits.
    return torch.linalg.vector_norm(input, dim=1, dtype=torch.float32).square().sum()


def _column_sums(input: Tensor) -> Tensor:
    if input.layout == torch.sparse_csr:
        sums = torch.zeros(input.shape[1], dtype=input.dtype)
        return sums.index_add_(0, input.col_indices(), input.values())
    return input.sum(0, dtype=torch.float32)


def _times_input(left: Tensor, input: Tensor) -> Tensor:
    """left · input, float32 where PyTorch's product gives it."""
    if input.layout == torch.sparse_csr:
        return (input.t().to_sparse_csr() @ left.t()).t()
    # Few rows by many columns: the orientation in which PyTorch is faster.
    return (left.to(input.dtype) @ input).float()
