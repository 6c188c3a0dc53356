"""What a backend offers: a name, a reason when it cannot run, and seven kernels.

Shapes: input ``[N, D]``, target ``[N, Dₒ]`` and :class:`Weights`, all of one dtype and device, any strides. Sums, codes
and gradients of weights leave a kernel in the accumulation dtype (:func:`accumulation_dtype`), those of a step already
scaled; the cast to the user's dtype comes last. A result that was not asked for is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels add up: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tf32_allowed() -> bool:
    """Whether PyTorch's settings let products of float32 on a GPU round their operands to tf32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


class Weights(NamedTuple):
    """Encoder ``[K, D]``, decoder ``[Dₒ, K]`` (None = tied: the encoder's transpose), biases ``[K]`` and ``[Dₒ]``."""

    encoder: Tensor
    decoder: Tensor | None
    encoder_bias: Tensor | None
    decoder_bias: Tensor | None

    @property
    def rank(self) -> int:
        """K."""
        return self.encoder.shape[0]

    @property
    def in_features(self) -> int:
        """D."""
        return self.encoder.shape[1]

    @property
    def out_features(self) -> int:
        """Dₒ."""
        return self.encoder.shape[1] if self.decoder is None else self.decoder.shape[0]

    @property
    def full_decoder(self) -> Tensor:
        """The decoder ``[Dₒ, K]``, tied or not."""
        return self.encoder.t() if self.decoder is None else self.decoder


class Call(NamedTuple):
    """What is asked for: what a backend needs to know to say whether it is worth it.

    ``operation`` is ``"mse_loss"`` (of ``rows`` elements), ``"bottleneck"`` or ``"bottleneck_mse_loss"``; ``gradients``
    says whether any argument will want one.
    """

    operation: str
    dtype: torch.dtype
    rows: int
    in_features: int = 1
    out_features: int = 1
    rank: int = 1
    sparse: bool = False
    gradients: bool = False


class Backend(Protocol):
    """One way to run the operations."""

    name: str

    def unavailable(self) -> str | None:
        """None, or why this backend cannot run on this machine."""

    def refuses(self, tensors: Sequence[Tensor]) -> str | None:
        """None, or why this backend cannot run on these tensors."""

    def declines(self, call: Call) -> str | None:
        """None, or why ``auto`` passes this backend by: it measured slower than plain PyTorch on such a call."""

    def form(self, call: Call, tied: bool, device: torch.device) -> str:
        """How :meth:`step` (or :meth:`sparse_step`) computes: the words :func:`byol_fast.explain` shows.

        Raises:
            ValueError: it would raise this, too.
        """


class Kernels(Backend, Protocol):
    """A backend with kernels of its own (the reference has none: it is differentiated by autograd)."""

    def squared_error(self, input: Tensor, target: Tensor) -> Tensor:
        """Σ (input − target)², 0-dim."""

    def squared_error_backward(
        self, input: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """``scale·(input − target)`` and its negative, in the dtype of the input."""

    def bottleneck(
        self,
        input: Tensor,
        weights: Weights,
        activation: str,
        residual: bool,
        save_code: bool,
    ) -> list[Tensor | None]:
        """The output ``[N, Dₒ]`` in the input's dtype, and the pre-activation U ``[N, K]``."""

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
        """Gradients of (input, *weights).

        The gradient of the input has its dtype. Tied: the encoder's holds the sum of both roles of the weight.
        """

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
        """``scale·Σ R²``, its gradients to the weights, Z and dU; dU is the gradient of ½ Σ R², unscaled.

        In half precision a scaled dU would underflow. So the scale is applied last, to the sums over rows.
        """

    def sparse_step(
        self,
        csr: tuple[Tensor, Tensor, Tensor],
        weights: Weights,
        activation: str,
        needs: Sequence[bool],
        scale: float,
    ) -> list[Tensor | None]:
        """Like :meth:`step` without a target, for an input in CSR form: ``scale·Σ R²`` and the four gradients.

        ``csr``: row_starts ``[N + 1]`` and columns ``[nnz]``, int64, and values ``[nnz]`` in the dtype of the weights.
        """

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
        """``scale·(dU We − [target is None] R)`` and ``−scale·R``, in the input's dtype."""


def dense_blocks(
    step: Callable[..., list[Tensor | None]],
    csr: tuple[Tensor, Tensor, Tensor],
    weights: Weights,
    activation: str,
    needs: Sequence[bool],
    scale: float,
    rows: int,
) -> list[Tensor | None]:
    """:meth:`Kernels.sparse_step` by :meth:`Kernels.step`, making so many ``rows`` dense at a time."""
    row_starts, columns, values = csr
    sums: list[Tensor | None] = []
    for first in range(0, row_starts.numel() - 1, rows):
        starts = row_starts[first : first + rows + 1]
        stored = slice(int(starts[0]), int(starts[-1]))
        count = starts.numel() - 1
        indices = torch.repeat_interleave(torch.arange(count, device=values.device), starts.diff())
        block = values.new_zeros(count, weights.in_features)
        block.index_put_((indices, columns[stored]), values[stored], accumulate=True)
        parts = step(block, None, weights, activation, needs, False, scale)[:5]
        sums = [part if not sums or part is None else sums[i] + part for i, part in enumerate(parts)]  # type: ignore[operator]
    return sums


def wanted(results: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """The results asked for, None for the others."""
    return [result if need else None for result, need in zip(results, needs, strict=True)]


def scaled(results: Sequence[Tensor | None], scale: float) -> list[Tensor | None]:
    """What :meth:`Kernels.step` returns, of Σ R² and the gradients of ½ Σ R², which are overwritten, and more."""
    for some, factor in ((results[:1], scale), (results[1:5], 2 * scale)):
        present = [result for result in some if result is not None]
        if present:
            torch._foreach_mul_(present, factor)
    return list(results)


# Rounding the code and its gradient to bfloat16, as eager does, does not average out over fewer rows than this.
_FEW_ROWS = 32


def step_dtype(dtype: torch.dtype, rows: int) -> torch.dtype:
    """The dtype of which a step takes its tensors: float32 for a few rows of bfloat16."""
    return torch.float32 if dtype == torch.bfloat16 and rows < _FEW_ROWS else dtype


def few_rows_as_float(input: Tensor, target: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor | None, Weights]:
    """The tensors of a step, in :func:`step_dtype`."""
    if step_dtype(input.dtype, input.shape[0]) == input.dtype:
        return input, target, weights
    others = Weights(weights.encoder.float(), *(_float(tensor) for tensor in weights[1:]))
    return input.float(), _float(target), others


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
