"""Where PyTorch's own operations take less time on a CPU than the native kernels: what ``auto`` goes by there.

The rules count the work; their numbers were fitted to measurements on two cores. With N rows, D features and rank K,
the kernels save passes over N×D matrices and, in a training step, 2NDK of 10NDK operations. They pay by products of
4K²(N + D) operations, by packing their operands, and by what surrounds a kernel. So they want much work, many rows for
each unit of the rank, and many features for each unit of the rank. Where only the loss is wanted no operations are
saved, and a layer saves no pass over N×D.

Half precision depends on whether PyTorch has products for it: for bfloat16 it has with AVX-512; where it has none, it
takes up to twelve times as long as the kernels (bench/results/crossovers-avx2.json).
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from .base import Call

# Below so many elements PyTorch takes less time for a squared error, and for one with its gradients.
FEW_ELEMENTS, _FEW_ELEMENTS_BACKWARD = 2**18, 2**20


class _Least(NamedTuple):
    """The least that the kernels want: rows·rank·(in_features + out_features), rows/rank, and so on.

    From a rank on, any number of outputs will do.
    """

    work: int
    rows_per_rank: int = 0
    features_per_rank: int = 0
    outputs: int = 0
    or_rank: int = sys.maxsize


class _Operations(NamedTuple):
    """What each operation wants."""

    step: _Least
    loss: _Least
    layer: _Least
    layer_step: _Least


# Outputs whose memory PyTorch has mapped anew for every call: 32 MiB.
_LARGE, _LARGE_BFLOAT16 = 2**23, 2**24
_ON_AVX512 = _Operations(
    step=_Least(500_000, 4, 2),
    loss=_Least(8_000_000, 8, 4),
    layer=_Least(8_000_000, 8, outputs=_LARGE, or_rank=256),
    layer_step=_Least(32_000_000, 16),
)
_BFLOAT16_ON_AVX512 = _Operations(
    step=_Least(500_000, 8, 4),
    loss=_Least(500_000, 16, 4),
    layer=_Least(8_000_000, 8, outputs=_LARGE_BFLOAT16),
    layer_step=_Least(8_000_000, 8, outputs=_LARGE_BFLOAT16),
)
_ON_AVX2 = _Operations(
    step=_Least(8_000_000, 8, 3),
    loss=_Least(16_000_000, 16, 6),
    layer=_Least(32_000_000, 16, 6, outputs=_LARGE),
    layer_step=_Least(32_000_000, 64, 8),
)
# Tiles of bfloat16: PyTorch has them for bfloat16 alone, the kernels for float32 and float16, too. At low rank they
# gain little by them, for most of a layer's time is in its input and output.
_ON_AMX = _Operations(
    step=_Least(6_000_000, 4, 1),
    loss=_Least(8_000_000, 4, 2),
    layer=_Least(48_000_000, 8, outputs=_LARGE, or_rank=32),
    layer_step=_Least(48_000_000, 8, outputs=_LARGE // 2, or_rank=32),
)
_BFLOAT16_ON_AMX = _Operations(
    step=_Least(1_000_000, 4, 3),
    loss=_Least(1_000_000, 4, 4),
    layer=_Least(8_000_000, 8, outputs=_LARGE_BFLOAT16),
    layer_step=_Least(32_000_000, 32, 8),
)
_WITHOUT_PRODUCTS = _Operations(*[_Least(300_000)] * 4)
_LEAST = {
    "amx": {
        torch.float32: _ON_AMX,
        torch.float64: _ON_AVX512,
        torch.bfloat16: _BFLOAT16_ON_AMX,
        torch.float16: _ON_AMX,
    },
    "avx512": {
        torch.float32: _ON_AVX512,
        torch.float64: _ON_AVX512,
        torch.bfloat16: _BFLOAT16_ON_AVX512,
        torch.float16: _WITHOUT_PRODUCTS,
    },
    "avx2": {
        torch.float32: _ON_AVX2,
        torch.float64: _ON_AVX2,
        torch.bfloat16: _WITHOUT_PRODUCTS,
        torch.float16: _WITHOUT_PRODUCTS,
    },
}


class Crossovers:
    """The rules for an instruction set of the native core."""

    def __init__(self, instruction_set: str) -> None:
        # What was not measured goes by what was measured with AVX2.
        self._least = _LEAST.get(instruction_set.partition("_")[0], _LEAST["avx2"])
        self._least_of_any = {
            dtype: (min(least.work for least in operations), min(least.rows_per_rank for least in operations))
            for dtype, operations in self._least.items()
        }

    def is_small(self, dtype: torch.dtype, rows: int, in_features: int, out_features: int, rank: int) -> bool:
        """Whether PyTorch is faster at every operation of this size."""
        work, rows_per_rank = self._least_of_any[dtype]
        return rows * rank * (in_features + out_features) < work or rows < rows_per_rank * rank

    def reason_for_pytorch(self, call: Call) -> str | None:
        """Why PyTorch is faster on such a call; None where it is not."""
        if call.operation == "mse_loss":
            few = _FEW_ELEMENTS_BACKWARD if call.gradients else FEW_ELEMENTS
            return None if call.rows >= few else f"PyTorch is faster on fewer than {few} elements"
        if call.sparse or call.dtype not in self._least:
            return None
        least = self._wanted(call)
        if call.rows * call.rank * (call.in_features + call.out_features) < least.work:
            return "PyTorch is faster on so small a product"
        if call.rows < least.rows_per_rank * call.rank:
            return f"PyTorch is faster on fewer rows than {least.rows_per_rank}·rank"
        if max(call.in_features, call.out_features) < least.features_per_rank * call.rank:
            return f"PyTorch is faster on fewer features than {least.features_per_rank}·rank"
        if call.rows * call.out_features < least.outputs and call.rank < least.or_rank:
            return f"PyTorch's own products are as fast on a layer with fewer than {least.outputs} results"
        return None

    def _wanted(self, call: Call) -> _Least:
        operations = self._least[call.dtype]
        if call.operation == "bottleneck":
            return operations.layer_step if call.gradients else operations.layer
        return operations.step if call.gradients else operations.loss
