"""The Triton backend: GPU kernels for float32, bfloat16 and float16, of ranks up to 128.

Two passes over X, four launches, no wait for the device: docs/triton.md. What the kernels are not made for (float64,
wider codes, sparse input) goes to :mod:`byol_fast.backends.gram`. Set ``TRITON_INTERPRET=1`` before Triton is imported
and the same kernels run, slowly, on CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import verified
from ..base import Call, Weights, few_rows_as_float, scaled, step_dtype, tf32_allowed, wanted
from ..gram import Gram
from . import tune
from .config import MAX_RANK

_OLDEST = (3, 6)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _missing() -> str | None:
    """None, or what is wrong with the installation of Triton. It is not imported: that takes a second."""
    spec = importlib.util.find_spec("triton")
    # A folder that happens to have this name is a package without a file.
    if spec is None or spec.origin is None:
        return "Triton is not installed (pip install triton)"
    version = _version(Path(spec.origin))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return f"Triton {version} is too old: {oldest} or later is needed (pip install --upgrade triton)"
    return None


def _version(module: Path) -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        # PyTorch for AMD and its nightly builds bring Triton under other names.
        found = re.search(r"^__version__ = ['\"](.+)['\"]", module.read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else "of unknown version"


# Asked with the package, not at first use: `torch.compile` cannot trace a search for modules.
_reason = _missing()
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> ModuleType:
    """The launchers; imports Triton at first use."""
    return importlib.import_module(f"{__name__}.launch")


class Triton:
    """CUDA tensors (in the interpreter: CPU tensors); see :class:`byol_fast.backends.base.Kernels`."""

    name = "triton"

    def __init__(self) -> None:
        self._gram = Gram()

    def unavailable(self) -> str | None:
        if _reason is None and not _interpreted and not torch.cuda.is_available():
            return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        return _reason

    def refuses(self, tensors: Sequence[Tensor]) -> str | None:
        device_type = "cpu" if _interpreted else "cuda"
        for tensor in tensors:
            if tensor.device.type != device_type:
                return f"it runs tensors on {device_type}, not on {tensor.device.type}"
            if tensor.dtype not in (*_DTYPES, torch.float64):
                return f"it has no kernels for {tensor.dtype}"
            architecture = "" if _interpreted else verified.architecture(tensor.device)
            if architecture.startswith("sm_") and int(architecture[3:]) < 80:
                return f"its kernels need a GPU of compute capability 8.0 or later, and this one is {architecture}"
        return None

    def declines(self, call: Call) -> str | None:
        if call.sparse or call.dtype == torch.float64 or call.rank > MAX_RANK:
            return f"its kernels are for dense float32, bfloat16 and float16, and ranks up to {MAX_RANK}"
        return None

    def form(self, call: Call, tied: bool, device: torch.device) -> str:
        reason = self.declines(call)
        if reason is not None:
            return f"{self._gram.form(call, tied, device)}, by PyTorch's products ({reason})"
        gram = "gram (tied: one product)" if tied else "gram"
        if step_dtype(call.dtype, call.rows) != torch.float32 or tf32_allowed():
            return gram
        return f"{gram}, direct for row tiles with a residual ratio below 0.004"

    def squared_error(self, input: Tensor, target: Tensor) -> Tensor:
        if input.dtype == torch.float64:
            return self._gram.squared_error(input, target)
        launch = _kernels()
        with launch.on_device(input):
            total: Tensor = launch.squared_error_sum(input, target)
        return total

    def squared_error_backward(
        self, input: Tensor, target: Tensor, scale: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        if input.dtype == torch.float64:
            return self._gram.squared_error_backward(input, target, scale, needs)
        launch = _kernels()
        with launch.on_device(input):
            gradients: list[Tensor | None] = launch.squared_error_gradients(input, target, scale, needs)
        return gradients

    def bottleneck(
        self,
        input: Tensor,
        weights: Weights,
        activation: str,
        residual: bool,
        save_code: bool,
    ) -> list[Tensor | None]:
        if not _fits(input, weights):
            return self._gram.bottleneck(input, weights, activation, residual, save_code)
        launch = _kernels()
        with launch.on_device(input):
            options = (activation, residual, save_code)
            results: list[Tensor | None] = tune.run(
                launch.forward, ("forward",), input, weights.rank, *weights, *options
            )
        return results

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
        if not _fits(input, weights):
            return self._gram.bottleneck_backward(grad, input, weights, code, activation, residual, needs)
        launch = _kernels()
        with launch.on_device(input):
            more = (input, *weights[:2], code, activation, residual, needs[0], any(needs[1:]))
            results = tune.run(launch.backward, ("backward", "collect"), grad, weights.rank, *more)
        return wanted(results, needs)

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
        if not _fits(input, weights):
            return self._gram.step(input, target, weights, activation, needs, save_codes, scale)
        launch = _kernels()
        with launch.on_device(input):
            input, target, weights = few_rows_as_float(input, target, weights)
            more = (target, *weights, activation, any(needs), save_codes)
            results = tune.run(launch.step, ("encode", "collect"), input, weights.rank, *more)
        return scaled(wanted(results, (True, *needs, save_codes, save_codes)), scale)

    def sparse_step(
        self,
        csr: tuple[Tensor, Tensor, Tensor],
        weights: Weights,
        activation: str,
        needs: Sequence[bool],
        scale: float,
    ) -> list[Tensor | None]:
        return self._gram.sparse_step(csr, weights, activation, needs, scale)

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
        if not _fits(input, weights):
            return self._gram.step_input_gradients(input, target, weights, code, code_gradient, scale, needs)
        launch = _kernels()
        with launch.on_device(input):
            encoder, decoder, _, bias = weights
            more = (target, encoder, decoder, bias, code, code_gradient, scale, needs)
            gradients: list[Tensor | None] = tune.run(launch.data_gradients, ("data",), input, weights.rank, *more)
        return gradients


def _fits(input: Tensor, weights: Weights) -> bool:
    return input.dtype != torch.float64 and weights.rank <= MAX_RANK
