"""Calls that are like one before: the backend that checks and choice came to is remembered by all that they look at.

Checks and choice run through so much code that a step feels them where a kernel has just driven all of it out of the
caches; in a loop of training steps, every call but the first is like one before.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .backends import current

# Where shapes never come back, what is remembered is forgotten now and then.
_MOST = 4096
_PLAIN = (Tensor, Parameter)
_STRIDED = torch.strided
_backends: dict[Hashable, str] = {}


def signature(tensors: Sequence[Tensor | None], *options: Hashable) -> Hashable:
    """All that checks and the choice of a backend look at, of plain tensors on the CPU; None of any other call.

    None, too, where a compiler or a transform traces the call, a mode watches it, or autocast casts its tensors.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
    ):
        return None
    parts: list[Hashable] = [current(), torch.is_grad_enabled(), *options]
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        elif type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout is _STRIDED:
            parts += tensor.dtype, tensor.shape, tensor.requires_grad
        else:
            return None
    return tuple(parts)


def recall(call: Hashable) -> str | None:
    """The backend of a call with this signature, if there was one before."""
    try:
        return None if call is None else _backends.get(call)
    except TypeError:
        # An option that has no hash is no name: the checks say so.
        return None


def remember(call: Hashable, backend: str) -> str:
    """Returns the backend."""
    if call is None:
        return backend
    if len(_backends) >= _MOST:
        _backends.clear()
    _backends[call] = backend
    return backend
