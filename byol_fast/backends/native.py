"""The native backend: CPU kernels in C++ (csrc/), given raw addresses of contiguous-row matrices."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Call, Weights, accumulation_dtype, dense_blocks, few_rows_as_float, step_dtype
from .crossovers import Crossovers
from .layout import collapse

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "tanh": 5}
_FORMS = {"auto": 0, "gram": 1, "direct": 2}
# The residual ratio below which a row tile takes the direct form (kDirectBelow in csrc/cpu/step.h).
_DIRECT_BELOW = {torch.float32: 4e-3, torch.float64: 1e-3}
# Rows of a sparse input that are made dense at a time, when they have to be.
_DENSE_ROWS = 256
# Bytes from which on the system's allocator often gives freed memory back to the system; from 32 MiB on it always does.
_LARGE = 2**22
_ABSENT = (0, 0)


def _load() -> tuple[Any, str | None]:
    """The extension module, or the reason why there is none."""
    try:
        module = importlib.import_module("byol_fast._native")
        module.info()
    except ImportError as error:
        return None, _build_failure() or f"its extension module does not load: {error}"
    except RuntimeError as error:
        return None, str(error)
    return module, None


def _build_failure() -> str | None:
    record = Path(__file__).parent.parent / "_build.json"
    if not record.exists():
        return "the extension module was not built (run `pip install .`)"
    reason: str | None = json.loads(record.read_text())["reason"]
    return reason


# Loaded with the package, not at first use: `torch.compile` cannot trace an import.
_native, _reason = _load()
crossovers = Crossovers("" if _native is None else _native.info()["instruction_set"])


class Native:
    """CPU tensors of float32, float64, bfloat16 and float16; see :class:`byol_fast.backends.base.Kernels`."""

    name = "native"

    def unavailable(self) -> str | None:
        return _reason

    def info(self) -> dict[str, Any]:
        """Instruction set in use, those this processor could run, thread pool, compiler."""
        result: dict[str, Any] = _native.info()
        return result

    def refuses(self, tensors: Sequence[Tensor]) -> str | None:
        for tensor in tensors:
            if not tensor.is_cpu:
                return f"it runs tensors on the CPU, not on {tensor.device.type}"
            if tensor.dtype not in _DTYPES:
                return f"it has no kernels for {tensor.dtype}"
        return None

    def declines(self, call: Call) -> str | None:
        return crossovers.reason_for_pytorch(call)

    def form(self, call: Call, tied: bool, device: torch.device) -> str:
        if call.sparse:
            gram = "sparse gram (tied: one product)" if tied else "sparse gram"
            threshold = _DIRECT_BELOW.get(call.dtype)
            return (
                gram
                if threshold is None
                else f"{gram}, direct on blocks of rows for a residual ratio below {threshold:g}"
            )
        gram = "gram (tied: one product)" if tied else "gram"
        threshold = _DIRECT_BELOW.get(step_dtype(call.dtype, call.rows))
        return gram if threshold is None else f"{gram}, direct for row tiles with a residual ratio below {threshold:g}"

    def squared_error(self, input: Tensor, target: Tensor) -> Tensor:
        rows, cols, _matrices, (x, t) = _collapsed(input, target)
        total = _sum_like(input)
        _native.squared_error(_DTYPES[input.dtype], torch.get_num_threads(), rows, cols, x, t, total.data_ptr())
        return total

    def squared_error_backward(
        self, input: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        outputs = [_result_like(tensor) if need else None for tensor, need in zip((input, target), needs, strict=True)]
        present = [output for output in outputs if output is not None]
        rows, cols, matrices, (x, t, *others) = _collapsed(input, target, *present)
        addresses = iter(others)
        d_input, d_target = (_ABSENT if output is None else next(addresses) for output in outputs)
        _native.squared_error_backward(
            _DTYPES[input.dtype], torch.get_num_threads(), rows, cols, x, t, float(scale), d_input, d_target
        )
        # An output that could not be viewed as a matrix was copied: its values go back.
        for output, matrix in zip(present, matrices[2:], strict=True):
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
        sizes = _sizes(input, weights)
        output = _result(input, (sizes[0], sizes[2]))
        code = _result(input, (sizes[0], sizes[3]), accumulation_dtype(input.dtype)) if save_code else None
        _native.forward(
            _DTYPES[input.dtype],
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
            sizes,
            _at(input),
            *_addresses(weights),
            residual,
            output.data_ptr(),
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
        sizes = _sizes(input, weights)
        d_input = _result(input, input.shape) if needs[0] else None
        d_weights = _weight_gradients(input, sizes, needs[1:], _result)
        _native.backward(
            _DTYPES[input.dtype],
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
            sizes,
            _at(input),
            *_addresses(weights)[:2],
            residual,
            _at(grad),
            code.contiguous().data_ptr(),
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
        form: str = "auto",
    ) -> list[Tensor | None]:
        input, target, weights = few_rows_as_float(input, target, weights)
        input, target, weights = _rows(input), _optional_rows(target), _weight_rows(weights)
        sizes = _sizes(input, weights)
        dtype = accumulation_dtype(input.dtype)
        d_weights = _weight_gradients(input, sizes, needs, _result)
        code, code_gradient = (_result(input, (sizes[0], sizes[3]), dtype) if save_codes else None for _ in range(2))
        total = _sum_like(input)
        _native.step(
            _DTYPES[input.dtype],
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
            sizes,
            _at(input),
            *_addresses(weights),
            _FORMS[form],
            scale,
            _at(target),
            total.data_ptr(),
            [_address(gradient) for gradient in d_weights],
            _address(code),
            _address(code_gradient),
        )
        return [total, *d_weights, code, code_gradient]

    def sparse_step(
        self,
        csr: tuple[Tensor, Tensor, Tensor],
        weights: Weights,
        activation: str,
        needs: Sequence[bool],
        scale: float,
    ) -> list[Tensor | None]:
        row_starts, columns, values = (part.contiguous() for part in csr)
        weights = _weight_rows(weights)
        sizes = (row_starts.numel() - 1, weights.in_features, weights.in_features, weights.rank)
        d_weights = _weight_gradients(values, sizes, needs, _result)
        total = _sum_like(values)
        squared_error, energy = _native.sparse_step(
            _DTYPES[values.dtype],
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
            sizes,
            row_starts.data_ptr(),
            columns.data_ptr(),
            values.data_ptr(),
            *_addresses(weights),
            scale,
            total.data_ptr(),
            [_address(gradient) for gradient in d_weights],
        )
        if squared_error < _DIRECT_BELOW.get(values.dtype, 0.0) * energy:
            # The residual is so small that the Gram form cancels.
            return dense_blocks(self.step, csr, weights, activation, needs, scale, _DENSE_ROWS)
        return [total, *d_weights]

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
        sizes = _sizes(input, weights)
        encoder, decoder, _, decoder_bias = _addresses(weights)
        d_input = _result(input, input.shape) if needs[0] else None
        d_target = _result(input, (sizes[0], sizes[2])) if needs[1] else None
        _native.step_input_gradients(
            _DTYPES[input.dtype],
            torch.get_num_threads(),
            sizes,
            _at(input),
            encoder,
            decoder,
            decoder_bias,
            _at(target),
            code.contiguous().data_ptr(),
            code_gradient.contiguous().data_ptr(),
            float(scale),
            _address(d_input),
            _address(d_target),
        )
        return [d_input, d_target]

    def scatter(self, rows: Tensor, shift: Tensor, image: Tensor) -> tuple[Tensor, int]:
        """Add ``Σ (x − shift)(x − shift)ᵀ`` to the upper triangle of ``image``; returns ``Σ (x − shift)``, and a count.

        It says how many rows were added: all, or, if one of them holds NaN or Inf, some before it. rows ``[n, D]`` and
        shift ``[D]`` are float32 or float64, image ``[D, D]`` (contiguous) and the sum float64.
        """
        rows, shift = _rows(rows), shift.contiguous()
        sums = torch.zeros_like(image[0])
        added = _native.scatter(
            _DTYPES[rows.dtype],
            torch.get_num_threads(),
            *rows.shape,
            _at(rows),
            shift.data_ptr(),
            image.data_ptr(),
            sums.data_ptr(),
        )
        return sums, added


def _collapsed(*tensors: Tensor) -> tuple[int, int, Sequence[Tensor], list[tuple[int, int]]]:
    """Rows, columns, matrices of :func:`collapse` and where they are; contiguous tensors need no views."""
    if all(tensor.is_contiguous() for tensor in tensors):
        cols = tensors[0].numel()
        return 1, cols, tensors, [(tensor.data_ptr(), cols) for tensor in tensors]
    rows, cols, matrices = collapse(*tensors)
    return rows, cols, matrices, [_at(matrix) for matrix in matrices]


def _sum_like(input: Tensor) -> Tensor:
    """Where a kernel puts a sum of squares."""
    return input.new_empty((), dtype=accumulation_dtype(input.dtype))


def _result(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape, dtype=dtype)``; large memory is kept, and used again (csrc/cpu/memory.h)."""
    dtype = dtype or like.dtype
    count = math.prod(shape)
    if count * dtype.itemsize < _LARGE:
        return like.new_empty(shape, dtype=dtype)
    memory = torch.frombuffer(_native.LargeBlock(count * dtype.itemsize), dtype=dtype, count=count)
    # No view of it: autograd would not let the user change one in place.
    empty = like.new_empty(0, dtype=dtype)
    return empty.set_(memory.untyped_storage(), 0, shape, memory.view(*shape).stride())


def _result_like(tensor: Tensor) -> Tensor:
    """``torch.empty_like``, which keeps strides."""
    return _result(tensor, tensor.shape) if tensor.is_contiguous() else torch.empty_like(tensor)


def _rows(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous, else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _optional_rows(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else _rows(matrix)


def _weight_rows(weights: Weights) -> Weights:
    """The weights, contiguous as a kernel wants them."""
    encoder, decoder, *biases = weights
    return Weights(_rows(encoder), _optional_rows(decoder), *(_contiguous(bias) for bias in biases))


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def _at(matrix: Tensor | None) -> tuple[int, int]:
    """Address and row stride."""
    return _ABSENT if matrix is None else (matrix.data_ptr(), matrix.stride(0))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(weights: Weights) -> tuple[tuple[int, int], tuple[int, int], int, int]:
    encoder, decoder, encoder_bias, decoder_bias = weights
    return _at(encoder), _at(decoder), _address(encoder_bias), _address(decoder_bias)


def _sizes(input: Tensor, weights: Weights) -> tuple[int, int, int, int]:
    return input.shape[0], weights.in_features, weights.out_features, weights.rank


def _weight_gradients(
    input: Tensor,
    sizes: tuple[int, int, int, int],
    needs: Sequence[bool],
    empty: Callable[..., Tensor] = Tensor.new_empty,
) -> list[Tensor | None]:
    """Empty gradients of the weights, None where not needed."""
    _, in_features, out_features, rank = sizes
    shapes = ((rank, in_features), (out_features, rank), (rank,), (out_features,))
    dtype = accumulation_dtype(input.dtype)
    return [empty(input, shape, dtype=dtype) if need else None for shape, need in zip(shapes, needs, strict=True)]
