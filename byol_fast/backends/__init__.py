"""The registry: which backends there are, which one runs a call, and why.

To add a backend, write one file with an object of the protocol :class:`~byol_fast.backends.base.Kernels` and name it in
``_REGISTRY``; to have ``auto`` consider it, name it in ``_PREFERENCE``. On a GPU, ``auto`` also wants to see it
verified (:mod:`byol_fast.backends.verified`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import verified
from .base import Backend, Call, Kernels, Weights, accumulation_dtype, wanted
from .crossovers import FEW_ELEMENTS
from .cuda import Cuda
from .gram import Gram
from .native import Native, crossovers
from .triton import Triton

__all__ = [
    "FEW_ELEMENTS",
    "BackendError",
    "BackendStatus",
    "Call",
    "Choice",
    "Weights",
    "accumulation_dtype",
    "backends",
    "choose",
    "current",
    "form",
    "is_small",
    "kernels",
    "scatter_kernel",
    "use_backend",
    "wanted",
]


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


class _Reference:
    """Plain PyTorch, differentiated by autograd: runs everywhere, on everything."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def refuses(self, tensors: Sequence[Tensor]) -> str | None:
        return None

    def declines(self, call: Call) -> str | None:
        return None

    def form(self, call: Call, tied: bool, device: torch.device) -> str:
        return "direct, the input made dense" if call.sparse else "direct"


_REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        _Reference(),
        Native(),
        Gram(),
        Triton(),
        Cuda(),
    )
}
# What `auto` tries on tensors of each kind of device, fastest first; the reference is what remains.
_PREFERENCE = {"cuda": ("cuda", "triton", "gram")}
_PREFERENCE_ELSEWHERE = ("native",)
_AUTO = "auto"
is_small = crossovers.is_small
_PLAIN = (Tensor, Parameter)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, and if not, the reason."""

    available: bool
    reason: str | None = None

    def __str__(self) -> str:
        return "available" if self.available else f"unavailable: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """The backend that runs a call, and why it was chosen."""

    backend: str
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: available, or unavailable with the reason."""
    return {name: _status(backend) for name, backend in _REGISTRY.items()}


def _status(backend: Backend) -> BackendStatus:
    reason = backend.unavailable()
    return BackendStatus(reason is None, reason)


def _require(name: str, source: str) -> str:
    """``name`` if it may be chosen; raises what a user can act upon otherwise."""
    if name != _AUTO and name not in _REGISTRY:
        valid = ", ".join((_AUTO, *_REGISTRY))
        raise ValueError(f"{source}: expected one of {valid}, got {name!r}")
    reason = None if name == _AUTO else _REGISTRY[name].unavailable()
    if reason is not None:
        raise BackendError(f"{source}: backend {name!r} cannot run here: {reason}; {_valid_choices()}")
    return name


def _valid_choices() -> str:
    runnable = [name for name, status in backends().items() if status.available]
    return f"valid choices on this machine: {', '.join((_AUTO, *runnable))}"


_requested = os.environ.get("BYOL_FAST_BACKEND") or _AUTO
# None while BYOL_FAST_BACKEND decides, so that a bad name fails the call that needs it and not the import.
_current: str | None = _AUTO if _requested == _AUTO else None


def current() -> str:
    """The backend in force: ``"auto"`` or the name given to :class:`use_backend` or ``BYOL_FAST_BACKEND``."""
    if _current is None:
        return _require(_requested, "BYOL_FAST_BACKEND")
    return _current


class use_backend:
    """Choose the backend, for good or for a block.

    ``use_backend("native")`` sets it for the whole process; ``with use_backend("reference"): …`` restores the former
    choice at the end. ``"auto"`` lets each call choose. The environment variable ``BYOL_FAST_BACKEND`` sets the initial
    choice.

    Raises:
        ValueError: no backend has this name.
        BackendError: the backend cannot run on this machine; the message says why and lists those that can.
    """

    def __init__(self, name: str) -> None:
        global _current
        checked = _require(name, "use_backend")
        self._previous = _current
        _current = checked

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._previous


def choose(tensors: Sequence[Tensor], call: Call) -> Choice:
    """The backend for a call on these tensors.

    Raises:
        BackendError: a backend was chosen by name and refuses these tensors.
    """
    name = current()
    if name == _AUTO:
        return _choose_automatically(tensors, call)
    reason = _refusal(name, tensors)
    if reason is not None:
        raise BackendError(f"backend {name!r} was chosen, but {reason}; {_valid_choices()}")
    return Choice(name, "chosen by name")


def _choose_automatically(tensors: Sequence[Tensor], call: Call) -> Choice:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # A kernel sees one sample at a time; PyTorch's own operations are batched, and differentiate in every mode.
        return Choice("reference", "a torch.func transform is active")
    reasons: list[str] = []
    device = tensors[0].device
    for name in _PREFERENCE.get(device.type, _PREFERENCE_ELSEWHERE):
        reason = (
            _REGISTRY[name].unavailable()
            or _REGISTRY[name].declines(call)
            or _refusal(name, tensors)
            or verified.reason_against(name, call, device)
        )
        if reason is None:
            return Choice(name, "; ".join([verified.reason_for(call, device), *reasons]))
        reasons.append(f"{name}: {reason}")
    return Choice("reference", "; ".join(reasons))


def _refusal(name: str, tensors: Sequence[Tensor]) -> str | None:
    # Kernels have no forward-mode derivatives, and a custom op would silently drop the tangents.
    if name != "reference" and forward_ad._current_level >= 0:
        return "forward-mode differentiation only runs in plain PyTorch"
    # A subclass (DTensor, quantised, logging, …) must see every operation on itself, so it goes through plain PyTorch.
    if name != "reference" and (has_torch_function(tensors) or any(map(_is_wrapper, tensors))):
        return "a tensor subclass only runs in plain PyTorch"
    return _REGISTRY[name].refuses(tensors)


def _is_wrapper(tensor: Tensor) -> bool:
    return type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor)


def form(name: str, call: Call, tied: bool, device: torch.device) -> str:
    """How the backend computes the training step, in words."""
    return _REGISTRY[name].form(call, tied, device)


def kernels(name: str) -> Kernels:
    """The kernels of a backend that :func:`choose` returned."""
    return cast(Kernels, _REGISTRY[name])


def scatter_kernel(rows: Tensor) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, int]] | None:
    """The kernel that adds up the scatter of these rows (:meth:`Native.scatter`); None: plain PyTorch has to do it."""
    native = _REGISTRY["native"]
    if current() not in (_AUTO, "native") or native.unavailable() or native.refuses((rows,)):
        return None
    return cast(Native, native).scatter
