"""The CUDA backend: kernels in C++ (csrc/cuda/) on PyTorch's current stream, in memory from its allocator.

No call waits for the device, so a CUDA graph can capture them all. The kernels have not run on a GPU yet: a CPU
emulation of their source is what tests them. Hence ``auto`` does not pick this backend; see docs/cuda.md.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Call, Weights, accumulation_dtype, few_rows_as_float, scaled, step_dtype
from .layout import collapse
from .native import (
    _ABSENT,
    _ACTIVATIONS,
    _DTYPES,
    _address,
    _addresses,
    _at,
    _optional_rows,
    _rows,
    _sizes,
    _weight_gradients,
    _weight_rows,
)

# The widest tile of codes there is (kMaxRank in csrc/cuda/abi.h).
_MAX_RANK = 128


def _load() -> tuple[Any, str | None]:
    """The extension module, or the reason why there is none."""
    try:
        return importlib.import_module("byol_fast._cuda"), None
    except ImportError as error:
        return None, _build_failure() or f"its extension module does not load: {error}"


def _build_failure() -> str | None:
    record = Path(__file__).parent.parent / "_build.json"
    if not record.exists():
        return "the extension module was not built (run `pip install .`)"
    reason: str | None = json.loads(record.read_text()).get("cuda_reason", "the extension module was not built")
    return reason


# Loaded with the package, not at first use: `torch.compile` cannot trace an import. This starts no driver.
_cuda, _reason = _load()


def _check_rank(rank: int) -> None:
    if rank > _MAX_RANK:
        raise ValueError(f"backend 'cuda': expected a rank ≤ {_MAX_RANK}, got {rank}")


class Cuda:
    """CUDA tensors of float32, bfloat16 and float16, rank up to 128; see :class:`byol_fast.backends.base.Kernels`."""

    name = "cuda"
    # Whether the step may read its rows once, on GPUs that can (sm_90) and where it fits (cluster_plan.h).
    single_pass = True

    def __init__(self, module: Any = _cuda, reason: str | None = _reason, device: str = "cuda") -> None:
        self._module, self._reason, self._device = module, reason, device

    def unavailable(self) -> str | None:
        if self._module is None:
            return self._reason
        # Asked only where a driver answers: PyTorch knows, and a fork may follow.
        if self._device == "cuda" and not torch.cuda.is_available():
            no_device: str = self._module.no_device() or "PyTorch sees no GPU"
            return no_device
        return self._module.no_device() or None

    def refuses(self, tensors: Sequence[Tensor]) -> str | None:
        for tensor in tensors:
            if tensor.device.type != self._device:
                return f"it runs tensors on {self._device}, not on {tensor.device.type}"
            if tensor.dtype not in _DTYPES or tensor.dtype == torch.float64:
                return f"it has no kernels for {tensor.dtype}"
        return None

    def declines(self, call: Call) -> str | None:
        if call.rank > _MAX_RANK:
            return f"it has no kernels for a rank above {_MAX_RANK}"
        return "made dense, the input is as large as PyTorch's" if call.sparse else None

    def form(self, call: Call, tied: bool, device: torch.device) -> str:
        _check_rank(call.rank)
        words = "gram (tied: one product in either pass)" if tied else "gram"
        if step_dtype(call.dtype, call.rows) == torch.float32:
            words += ", direct for row tiles with a residual ratio below 0.004"
        return f"{words}, the input made dense" if call.sparse else words

    def squared_error(self, input: Tensor, target: Tensor) -> Tensor:
        rows, cols, (x, t) = collapse(input, target)
        total = input.new_empty((), dtype=torch.float32)
        self._run(self._module.squared_error, input, _DTYPES[input.dtype], rows, cols, _at(x), _at(t), _address(total))
        return total

    def squared_error_backward(
        self, input: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        outputs = [
            torch.empty_like(tensor) if need else None for tensor, need in zip((input, target), needs, strict=True)
        ]
        present = [output for output in outputs if output is not None]
        rows, cols, (x, t, *matrices) = collapse(input, target, *present)
        # An output that could not be viewed as a matrix was copied: its values go back at the end.
        addresses = iter(matrices)
        d_input, d_target = (_ABSENT if output is None else _at(next(addresses)) for output in outputs)
        scale = scale.float()
        self._run(
            self._module.squared_error_backward,
            input,
            _DTYPES[input.dtype],
            rows,
            cols,
            _at(x),
            _at(t),
            _address(scale),
            d_input,
            d_target,
        )
        for output, matrix in zip(present, matrices, strict=True):
            if output.data_ptr() != matrix.data_ptr():
                output.copy_(matrix.reshape(output.shape))
        return outputs

    def bottleneck(
        self,
        input: Tensor,
        weights: Weights,
        activation: str,
        residual: bool,
        save_code: bool,
    ) -> list[Tensor | None]:
        input, weights = _rows(input), _weight_rows(weights)
        sizes = self._checked_sizes(input, weights)
        output = input.new_empty(sizes[0], sizes[2])
        code = input.new_empty((sizes[0], sizes[3]), dtype=torch.float32) if save_code else None
        self._run(
            self._module.forward,
            input,
            _DTYPES[input.dtype],
            _ACTIVATIONS[activation],
            sizes,
            _at(input),
            *_addresses(weights),
            residual,
            _address(output),
            _address(code),
        )
        return [output, code]

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
        grad, input, weights = _rows(grad), _rows(input), _weight_rows(weights)
        sizes = self._checked_sizes(input, weights)
        d_input = input.new_empty(input.shape) if needs[0] else None
        d_weights = _weight_gradients(input, sizes, needs[1:])
        self._run(
            self._module.backward,
            input,
            _DTYPES[input.dtype],
            _ACTIVATIONS[activation],
            sizes,
            _at(input),
            *_addresses(weights)[:2],
            residual,
            _at(grad),
            # Empty where only the decoder bias has a gradient.
            _address(code.contiguous() if code.numel() else None),
            _address(d_input),
            [_address(gradient) for gradient in d_weights],
        )
        return [d_input, *d_weights]

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
        input, target, weights = few_rows_as_float(input, target, weights)
        input, target, weights = _rows(input), _optional_rows(target), _weight_rows(weights)
        sizes = self._checked_sizes(input, weights)
        d_weights = _weight_gradients(input, sizes, needs)
        total = input.new_empty((), dtype=accumulation_dtype(input.dtype))
        code, code_gradient = (
            input.new_empty((sizes[0], sizes[3]), dtype=torch.float32) if save_codes else None for _ in range(2)
        )
        self._run(
            self._module.step,
            input,
            _DTYPES[input.dtype],
            _ACTIVATIONS[activation],
            sizes,
            _at(input),
            *_addresses(weights),
            _at(target),
            _address(total),
            [_address(gradient) for gradient in d_weights],
            _address(code),
            _address(code_gradient),
        )
        return scaled([total, *d_weights, code, code_gradient], scale)

    def sparse_step(
        self,
        csr: tuple[Tensor, Tensor, Tensor],
        weights: Weights,
        activation: str,
        needs: Sequence[bool],
        scale: float,
    ) -> list[Tensor | None]:
        dense = torch.sparse_csr_tensor(*csr, (csr[0].numel() - 1, weights.in_features)).to_dense()
        return self.step(dense, None, weights, activation, needs, False, scale)[:5]

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
        input, target, weights = _rows(input), _optional_rows(target), _weight_rows(weights)
        sizes = self._checked_sizes(input, weights)
        encoder, decoder, _, decoder_bias = _addresses(weights)
        d_input = input.new_empty(input.shape) if needs[0] else None
        d_target = input.new_empty(sizes[0], sizes[2]) if needs[1] else None
        code, code_gradient, scale = code.contiguous(), code_gradient.contiguous(), scale.float()
        self._run(
            self._module.step_input_gradients,
            input,
            _DTYPES[input.dtype],
            sizes,
            _at(input),
            encoder,
            decoder,
            decoder_bias,
            _at(target),
            _address(code),
            _address(code_gradient),
            _address(scale),
            _address(d_input),
            _address(d_target),
        )
        return [d_input, d_target]

    def push_in_clusters(self, cluster: int, rounds: int, device: torch.device) -> int:
        """Queues the probe of csrc/cuda/push_rate.h; the bytes that blocks of sm_90's clusters push to each other."""
        if device.type == "cpu":
            return int(self._module.push_in_clusters(cluster, rounds, 0))
        with torch.cuda.device(device):
            return int(self._module.push_in_clusters(cluster, rounds, torch.cuda.current_stream().cuda_stream))

    def _checked_sizes(self, input: Tensor, weights: Weights) -> tuple[int, int, int, int]:
        sizes = _sizes(input, weights)
        _check_rank(sizes[3])
        return sizes

    def _run(self, launcher: Callable[..., int], like: Tensor, *args: Any) -> None:
        """Queues a launcher's kernels on the current stream, with the workspace it asks for.

        The allocator hands memory out again in the order of the stream, so the workspace may be released here.
        """
        on_gpu = like.device.type == "cuda"
        with torch.cuda.device(like.device) if on_gpu else nullcontext():
            stream, processors, hopper = 0, 4, True
            if on_gpu:
                properties = torch.cuda.get_device_properties(like.device)
                stream, processors = torch.cuda.current_stream().cuda_stream, properties.multi_processor_count
                hopper = (properties.major, properties.minor) == (9, 0)
            where = (stream, processors, hopper and self.single_pass)
            size = launcher((0, *where), *args)
            if size == 0:
                return
            workspace = torch.empty(size, dtype=torch.uint8, device=like.device)
            launcher((workspace.data_ptr(), *where), *args)
