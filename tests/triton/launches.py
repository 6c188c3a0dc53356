"""What the backend launches: every kernel of every operation, with the arguments a GPU would get. Nothing runs."""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

from byol_fast.backends.base import Weights
from byol_fast.backends.triton import launch
from byol_fast.reference import ACTIVATIONS

# "tf32" is float32 where PyTorch's settings let products be rounded.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
RANKS = (16, 32, 64, 128)
# What else an operation may be asked for is compiled at one rank and these dtypes.
VARIED_RANK, VARIED_DTYPES = 64, ("bf16", "fp32")
# Multiprocessors of an H100: on more than one share of the rows, the sums over shares are loops.
_PROCESSORS = 132

# Names of kernels, and the call that launches them.
Operation = tuple[tuple[str, ...], Callable[[], object]]


@dataclass(frozen=True)
class Launched:
    """A kernel and what it was launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    configuration: Any

    def specialised(self) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
        """Signature, constants and attributes, by Triton's rules for what is constant or divisible by 16."""
        signature: dict[str, str] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[Any, Any] = {}
        for place, name in enumerate(self.kernel.arg_names):
            value = self.arguments[place] if place < len(self.arguments) else self.options[name]
            if place >= len(self.arguments) or (isinstance(value, int) and value == 1):
                signature[name], constants[(place,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(place,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes

    @cached_property
    def digest(self) -> str:
        """Of all that decides the machine code but the compiler: sources, specialisation, configuration."""
        parts = (*_sources(self.kernel), repr(self.specialised()), repr(self.configuration))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}


@cache
def _sources(kernel: Any) -> list[str]:
    """The tokens of a kernel and of all functions and constants of Triton's that it names, comments left out."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        tokens = tokenize.generate_tokens(io.StringIO(function.src).readline)
        words = [token.string for token in tokens if token.string.strip() and not token.string.startswith(("#", '"""'))]
        found[function.__name__] = " ".join(words)
        for word in sorted(set(words) - set(found)):
            value = function.fn.__globals__.get(word)
            if isinstance(value, triton.JITFunction):
                waiting.append(value)
            elif isinstance(value, tl.constexpr):
                found[word] = repr(value.value)
    return [f"{name} {found[name]}" for name in sorted(found)]


@cache
def launches(dtype: str, rank: int) -> dict[str, Launched]:
    """Every launch of the backend for a dtype and rank, as 'operation.kernel'."""
    recorded: dict[str, Launched] = {}
    operation, wanted = "", ("",)

    def record(kernel: Any, grid: Any, configuration: Any, *arguments: Any, **options: Any) -> None:
        if kernel.__name__ in wanted:
            recorded[f"{operation}.{kernel.__name__}"] = Launched(kernel, arguments, options, configuration)

    operations = _operations(DTYPES[dtype], rank)
    if rank == VARIED_RANK and dtype in VARIED_DTYPES:
        operations |= _variations(DTYPES[dtype], rank)
    matmul = torch.backends.cuda.matmul
    setting, matmul.fp32_precision = matmul.fp32_precision, "tf32" if dtype == "tf32" else "ieee"
    try:
        with mock.patch.multiple(launch, _run=record, _processors=lambda x: _PROCESSORS):
            for operation, (wanted, launched) in operations.items():  # noqa: B007
                launched()
    finally:
        matmul.fp32_precision = setting
    return recorded


def _operations(dtype: torch.dtype, rank: int, rows: int = 4096, features: int = 1024) -> dict[str, Operation]:
    """The operations as they take most registers; of each, the kernels that are not those of one before it."""
    x, weights, code, scale = _tensors(dtype, rank, rows, features)
    tied = weights._replace(decoder=None)
    encoder, decoder, _, bias = weights
    return {
        "step": (
            ("prepare", "encode", "collect", "finish"),
            lambda: launch.step(x, None, *weights, "gelu", True, False),
        ),
        "step_tied": (("encode", "finish"), lambda: launch.step(x, None, *tied, "gelu", True, False)),
        "step_target": (("encode", "collect"), lambda: launch.step(x, x, *weights, "gelu", True, False)),
        "step_codes": (("encode",), lambda: launch.step(x, None, *weights, "gelu", True, True)),
        "loss": (("encode", "add_up"), lambda: launch.step(x, None, *weights, "gelu", False, False)),
        "layer": (("forward",), lambda: launch.forward(x, *weights, "gelu", True, True)),
        "layer_backward": (
            ("backward", "collect", "finish"),
            lambda: launch.backward(x, x, encoder, decoder, code, "gelu", True, True, True),
        ),
        "layer_backward_tied": (
            ("finish",),
            lambda: launch.backward(x, x, encoder, None, code, "gelu", True, True, True),
        ),
        "data": (
            ("data_gradients",),
            lambda: launch.data_gradients(x, None, encoder, decoder, bias, code, code, scale, (True, False)),
        ),
        "data_target": (
            ("data_gradients",),
            lambda: launch.data_gradients(x, x, encoder, decoder, bias, code, code, scale, (True, True)),
        ),
        "squared_error": (("forward", "add_up"), lambda: launch.squared_error_sum(x, x)),
        "squared_error_backward": (
            ("backward",),
            lambda: launch.squared_error_gradients(x, x, scale, (True, True)),
        ),
    }


def _variations(dtype: torch.dtype, rank: int) -> dict[str, Operation]:
    """What else the operations may be asked for: sizes, strides, activations, and parts that are left out."""
    x, weights, code, scale = _tensors(dtype, rank)
    tied, plain = weights._replace(decoder=None), weights._replace(encoder_bias=None, decoder_bias=None)
    encoder, decoder, _, bias = weights
    rows, columns = x.new_empty(4096, 2048)[:, :1024], x.new_empty(1024, 4096).t()
    found: dict[str, Operation] = {
        "codes": (("encode",), lambda: launch.step(x, None, *weights, "gelu", False, True)),
        "step_tied_strides": (("prepare", "collect"), lambda: launch.step(x, None, *tied, "gelu", True, False)),
        "step_target_tied": (("encode",), lambda: launch.step(x, x, *tied, "gelu", True, False)),
        "step_plain": (
            ("prepare", "encode", "collect", "finish"),
            lambda: launch.step(x, None, *plain, "identity", True, False),
        ),
        "step_columns": (("encode", "collect"), lambda: launch.step(columns, None, *weights, "gelu", True, False)),
        "layer_plain": (("forward",), lambda: launch.forward(x, *plain, "identity", False, False)),
        "layer_columns": (("forward",), lambda: launch.forward(columns, *weights, "gelu", True, True)),
        "layer_backward_input": (
            ("backward",),
            lambda: launch.backward(x, x, encoder, decoder, code, "gelu", True, True, False),
        ),
        "layer_backward_weights": (
            ("backward",),
            lambda: launch.backward(x, x, encoder, decoder, code, "gelu", False, False, True),
        ),
        "data_plain": (
            ("data_gradients",),
            lambda: launch.data_gradients(x, None, encoder, decoder, None, code, code, scale, (True, False)),
        ),
        "data_only_target": (
            ("data_gradients",),
            lambda: launch.data_gradients(x, x, encoder, decoder, bias, code, code, scale, (False, True)),
        ),
        "data_no_target": (
            ("data_gradients",),
            lambda: launch.data_gradients(x, x, encoder, decoder, bias, code, code, scale, (True, False)),
        ),
        "squared_error_rows": (("forward",), lambda: launch.squared_error_sum(rows, rows)),
        "squared_error_backward_rows": (
            ("backward",),
            lambda: launch.squared_error_gradients(rows, rows, scale, (True, False)),
        ),
    }
    for activation in ACTIVATIONS:
        found[f"step_{activation}"] = (
            ("encode",),
            lambda activation=activation: launch.step(x, None, *weights, activation, True, False),
        )
        found[f"layer_{activation}"] = (
            ("forward",),
            lambda activation=activation: launch.forward(x, *weights, activation, True, True),
        )
        found[f"layer_backward_{activation}"] = (
            ("backward",),
            lambda activation=activation: launch.backward(x, x, encoder, decoder, code, activation, True, True, True),
        )
    return found | _ragged(dtype, rank)


def _ragged(dtype: torch.dtype, rank: int) -> dict[str, Operation]:
    """Sizes and strides that 16 divides not: the compiler can join no loads, and every edge is masked."""
    operations = _operations(dtype, rank - 3, 4095, 1023)
    wanted = {
        "step": ("prepare", "encode", "collect", "finish"),
        "layer": ("forward",),
        "layer_backward": ("backward",),
        "data": ("data_gradients",),
    }
    return {f"{name}_ragged": (kernels, operations[name][1]) for name, kernels in wanted.items()}


def _tensors(
    dtype: torch.dtype, rank: int, rows: int = 4096, features: int = 1024
) -> tuple[torch.Tensor, Weights, torch.Tensor, torch.Tensor]:
    """Rows, weights, a code and a scale."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    weights = Weights(tensor(rank, features), tensor(features, rank), tensor(rank), tensor(features))
    return tensor(rows, features), weights, torch.empty(rows, rank), torch.empty(())
