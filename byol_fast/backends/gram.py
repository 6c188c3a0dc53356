"""The Gram identity in PyTorch's own products: a few wide products and one epilogue, on any device.

For codes too wide for fused kernels (rank > 128), and for GPUs without Triton. Half precision takes the Gram form at
every residual ratio, with float32 products: a code rounded before it is squared would be worse than eager. float32 and
float64 take it down to a residual ratio, which is one number read back from the device; below, and where no number can
be read (while a CUDA graph is captured) or the products may be rounded (tf32), R is made in blocks of columns.

The formulas, and the symbols, are in docs/accuracy.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import ACTIVATIONS
from .base import (
    Call,
    Weights,
    accumulation_dtype,
    dense_blocks,
    few_rows_as_float,
    scaled,
    step_dtype,
    tf32_allowed,
    wanted,
)

_DIRECT_BELOW = {torch.float32: 4e-3, torch.float64: 1e-3}
_HALF = (torch.bfloat16, torch.float16)
# Elements of a block of R.
_BLOCK = 2**23

_aten = torch.ops.aten
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda e, u: e,
    "relu": lambda e, u: _aten.threshold_backward(e, u, 0),
    "gelu": lambda e, u: _aten.gelu_backward(e, u),
    "gelu_tanh": lambda e, u: _aten.gelu_backward(e, u, approximate="tanh"),
    "silu": lambda e, u: _aten.silu_backward(e, u),
    "tanh": lambda e, u: _aten.tanh_backward(e, torch.tanh(u)),
}


class Gram:
    """Any device; float32, float64, bfloat16 and float16; see :class:`byol_fast.backends.base.Kernels`."""

    name = "gram"

    def unavailable(self) -> str | None:
        return None

    def refuses(self, tensors: Sequence[Tensor]) -> str | None:
        for tensor in tensors:
            if tensor.device.type == "meta":
                return "it computes values, which tensors on meta have none of"
            if tensor.dtype not in (*_DIRECT_BELOW, *_HALF):
                return f"it has no products for {tensor.dtype}"
        return None

    def declines(self, call: Call) -> str | None:
        if call.operation != "bottleneck_mse_loss" or call.sparse:
            return "it only has something to offer for the loss of a dense input"
        return None

    def form(self, call: Call, tied: bool, device: torch.device) -> str:
        gram = "gram (tied: one product)" if tied else "gram"
        dtype = step_dtype(call.dtype, call.rows)
        threshold = _DIRECT_BELOW.get(dtype)
        words = gram if threshold is None else f"{gram}, direct for a residual ratio below {threshold:g}"
        if _must_be_direct(dtype, device):
            words = "direct, for products may be rounded (tf32) or no number be read (a CUDA graph is captured)"
        return f"{words}, on blocks of dense rows" if call.sparse else words

    def squared_error(self, input: Tensor, target: Tensor) -> Tensor:
        dtype = accumulation_dtype(input.dtype)
        return F.mse_loss(input.to(dtype), target.to(dtype), reduction="sum")

    def squared_error_backward(
        self, input: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        dtype = accumulation_dtype(input.dtype)
        gradient = scale * (input.to(dtype) - target.to(dtype))
        return [gradient.to(input.dtype) if needs[0] else None, (-gradient).to(input.dtype) if needs[1] else None]

    def bottleneck(
        self,
        input: Tensor,
        weights: Weights,
        activation: str,
        residual: bool,
        save_code: bool,
    ) -> list[Tensor | None]:
        preactivation = _plus(_product(input, weights.encoder.t()), weights.encoder_bias)
        code = ACTIVATIONS[activation](preactivation).to(input.dtype)
        output = _plus(_product(code, weights.full_decoder.t()), weights.decoder_bias)
        output = output + input if residual else output
        return [output.to(input.dtype), preactivation if save_code else None]

    def bottleneck_backward(
        self,
        grad: Tensor,
        input: Tensor,
        weights: Weights,
        code: Tensor,
        activation: str,
        residual: bool,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        tied, dtype = weights.decoder is None, accumulation_dtype(input.dtype)
        d_input = d_encoder = d_decoder = d_encoder_bias = None
        if any(needs[i] for i in (0, 1, 3)):
            slope = _SLOPES[activation](_product(grad, weights.full_decoder), code)
            d_encoder_bias = slope.sum(0) if needs[3] else None
            slope = slope.to(input.dtype)
            d_encoder = _product(slope.t(), input) if needs[1] else None
            if needs[0]:
                d_input = _product(slope, weights.encoder)
                d_input = (d_input + grad if residual else d_input).to(input.dtype)
        if needs[1] if tied else needs[2]:
            d_decoder = _product(grad.t(), ACTIVATIONS[activation](code).to(input.dtype))
        if tied and d_encoder is not None and d_decoder is not None:
            d_encoder, d_decoder = d_encoder + d_decoder.t(), None
        return [d_input, d_encoder, d_decoder, d_encoder_bias, grad.sum(0, dtype=dtype) if needs[4] else None]

    def step(
        self,
        input: Tensor,
        target: Tensor | None,
        weights: Weights,
        activation: str,
        needs: Sequence[bool],
        save_codes: bool,
        scale: float,
    ) -> list[Tensor | None]:
        step = _Step(activation, *few_rows_as_float(input, target, weights))
        total, gradients = step.run(any(needs) or save_codes)
        tied_needs = (needs[0], needs[1] and weights.decoder is not None, *needs[2:])
        codes = [step.code, step.slope] if save_codes else [None, None]
        return scaled([total, *wanted(gradients, tied_needs), *codes], scale)

    def sparse_step(
        self,
        csr: tuple[Tensor, Tensor, Tensor],
        weights: Weights,
        activation: str,
        needs: Sequence[bool],
        scale: float,
    ) -> list[Tensor | None]:
        return dense_blocks(self.step, csr, weights, activation, needs, scale, rows=4096)

    def step_input_gradients(
        self,
        input: Tensor,
        target: Tensor | None,
        weights: Weights,
        code: Tensor,
        code_gradient: Tensor,
        scale: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        decoder = weights.full_decoder
        dtype, goal = input.dtype, input if target is None else target
        outputs = [
            tensor.new_empty(tensor.shape) if need else None for tensor, need in zip((input, goal), needs, strict=True)
        ]
        for rows in _blocks(input.shape[0], max(input.shape[1], goal.shape[1])):
            # R is a small difference: the code is taken in two parts, as if it had not been rounded.
            high = code[rows].to(dtype)
            low = (code[rows] - high).to(dtype)
            error = _plus(_product(high, decoder.t()), weights.decoder_bias) - goal[rows]
            error = error + _product(low, decoder.t()) if dtype in _HALF else error
            if outputs[0] is not None:
                gradient = _product(code_gradient[rows].to(dtype), weights.encoder)
                outputs[0][rows] = (scale * (gradient - error if target is None else gradient)).to(dtype)
            if outputs[1] is not None:
                outputs[1][rows] = (-scale * error).to(dtype)
        return outputs


class _Step:
    """One step: the operands, then the code and its gradient."""

    def __init__(self, activation: str, input: Tensor, target: Tensor | None, weights: Weights) -> None:
        self.input, self.encoder = input, weights.encoder
        self.joint, self.target = target is None, input if target is None else target
        self.tied, self.decoder = weights.decoder is None, weights.full_decoder
        self.encoder_bias, self.activation = weights.encoder_bias, activation
        self.dtype = accumulation_dtype(input.dtype)
        bias = weights.decoder_bias
        self.bias = (self.decoder.new_zeros(self.decoder.shape[0]) if bias is None else bias).to(self.dtype)
        self.preactivation = self.code = self.slope = self.mean = self.centred = input.new_empty(0)

    def run(self, gradients: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Σ R² and the four gradients of ½ Σ R²; leaves Z and dU behind."""
        if _must_be_direct(self.input.dtype, self.input.device):
            self._encode(_product(self.input, self.encoder.t()))
            return self._direct(gradients)
        total, energy, error = self._gram_loss()
        threshold = _DIRECT_BELOW.get(self.input.dtype)
        # A number that is no number stays what it is: the comparison is false.
        if threshold is not None and bool(total < threshold * energy):
            return self._direct(gradients)
        self.slope = _SLOPES[self.activation](error, self.preactivation)
        results: list[Tensor | None] = self._gram_gradients() if gradients else [None] * 4
        # Rounding may leave a sum of squares just below zero; the gradients do not pass through it.
        return total.to(self.dtype).clamp(min=0), results

    def _encode(self, product: Tensor) -> None:
        self.preactivation = _plus(product, self.encoder_bias)
        self.code = ACTIVATIONS[self.activation](self.preactivation)

    def _gram_loss(self) -> tuple[Tensor, Tensor, Tensor]:
        """Σ R², the larger of Σ T² and Σ A², both in float64, and E."""
        rank = self.encoder.shape[0]
        if self.joint and not self.tied:
            product = _product(self.input, torch.cat([self.encoder, self.decoder.t()]).t())
            encoded, decoded = product[:, :rank], product[:, rank:]
        else:
            encoded = _product(self.input, self.encoder.t())
            decoded = encoded if self.joint else _product(self.target, self.decoder)
        self._encode(encoded)
        decoder, bias = self.decoder.double(), self.bias.double()
        gram, self.mean = decoder.t() @ decoder, self.code.mean(0)
        self.centred = self.code - self.mean
        # In float64, and Z = Y + 1 mᵀ: what rounding takes from G and the biases is the same in every row.
        q = decoded.double() - bias @ decoder
        error = _exact(self.centred, gram) + self.mean.double() @ gram - q
        energy = torch.linalg.vector_norm(self.target, dtype=torch.float64) ** 2
        self.target_sum = self.target.sum(0, dtype=torch.float64)
        centred = energy - 2 * bias @ self.target_sum + self.target.shape[0] * bias @ bias
        total = centred + (self.code * (error - q)).sum(dtype=torch.float64)
        return total, torch.maximum(energy, centred), error.to(self.dtype)

    def _gram_gradients(self) -> list[Tensor | None]:
        rank = self.encoder.shape[0]
        # Every product of the decoder's gradient takes the same Y, rounded as eager rounds Z.
        code, slope = self.centred.to(self.input.dtype), self.slope.to(self.input.dtype)
        if self.joint:
            product = _product(self.input.t(), torch.cat([code, slope], dim=1))
            target_code, d_encoder = product[:, :rank], product[:, rank:].t()
        else:
            target_code, d_encoder = _product(self.target.t(), code), _product(slope.t(), self.input)
        code_sum = code.sum(0, dtype=torch.float64).to(self.dtype)
        d_decoder = _exact(self.decoder, _product(code.t(), code) + torch.outer(self.mean, code_sum)) - target_code
        residual = self.decoder.double() @ self.code.sum(0, dtype=torch.float64) - self.target_sum
        d_decoder_bias = (residual + self.target.shape[0] * self.bias.double()).to(self.dtype)
        d_decoder = d_decoder + torch.outer(self.bias, code_sum) + torch.outer(d_decoder_bias, self.mean)
        return self._gradients(d_encoder, d_decoder, d_decoder_bias)

    def _direct(self, gradients: bool) -> tuple[Tensor, list[Tensor | None]]:
        rows, features = self.target.shape
        total = self.code.new_zeros(())
        error = torch.zeros_like(self.code)
        d_decoder, d_decoder_bias = self.code.new_empty(self.decoder.shape), self.code.new_empty(features)
        for columns in _blocks(features, rows):
            residual = _product(self.code, self.decoder[columns].t()) + self.bias[columns] - self.target[:, columns]
            total += torch.linalg.vector_norm(residual) ** 2
            error += _product(residual, self.decoder[columns])
            if gradients:
                d_decoder[columns], d_decoder_bias[columns] = _product(residual.t(), self.code), residual.sum(0)
        self.slope = _SLOPES[self.activation](error, self.preactivation)
        if not gradients:
            return total, [None] * 4
        return total, self._gradients(_product(self.slope.t(), self.input), d_decoder, d_decoder_bias)

    def _gradients(self, d_encoder: Tensor, d_decoder: Tensor, d_decoder_bias: Tensor) -> list[Tensor | None]:
        d_encoder = (d_encoder + d_decoder.t() if self.tied else d_encoder).contiguous()
        return [d_encoder, d_decoder.contiguous(), self.slope.sum(0), d_decoder_bias]


def _plus(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` with the result in the accumulation dtype."""
    if left.device.type == "cuda" and left.dtype in _HALF:
        return torch.mm(left, right, out_dtype=torch.float32)
    dtype = accumulation_dtype(left.dtype)
    return left.to(dtype) @ right.to(dtype)


def _exact(left: Tensor, right: Tensor) -> Tensor:
    """A product with a ``[K, K]`` matrix that no setting may round: in float64 where float32 might be tf32."""
    dtype = accumulation_dtype(left.dtype)
    wide = torch.float64 if _tf32_allowed(left) else dtype
    return (left.to(wide) @ right.to(wide)).to(dtype)


def _must_be_direct(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products may be rounded, or no number be read back."""
    if dtype not in _DIRECT_BELOW or device.type != "cuda":
        return False
    return tf32_allowed() or torch.cuda.is_current_stream_capturing()


def _tf32_allowed(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and tf32_allowed()


def _blocks(count: int, other: int) -> Iterator[slice]:
    """Slices of ``count`` such that a block of them by ``other`` stays small."""
    size = max(32, _BLOCK // max(other, 1))
    for first in range(0, count, size):
        yield slice(first, first + size)
