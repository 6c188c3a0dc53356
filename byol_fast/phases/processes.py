"""What training needs of torch.distributed; with one process, everything here is the identity.

The convention is that of DistributedSampler: every process is given the same data and takes its share of each batch, so
that a run of several processes computes what a run of one does. A DataLoader gives each process batches of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

__all__ = [
    "average_gradients_",
    "gathered",
    "guarded",
    "is_sharded",
    "launched",
    "load_whole_state",
    "method",
    "rank",
    "size",
    "sum_",
    "synchronize_",
    "unwrapped",
    "whole_state",
]


def size() -> int:
    """How many processes work on this run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return distributed.get_rank() if size() > 1 else 0


@contextmanager
def launched() -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if this is one of them, and part from them at the end."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched() or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def guarded() -> Iterator[None]:
    """Say what it means when processes stop hearing from each other."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise RuntimeError(f"process {rank()} of {size()} lost the others; one of them has ended ({reason})") from error


def sum_(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if size() > 1:
        with guarded():
            distributed.all_reduce(tensor)
    return tensor


def gathered(value: object) -> list[object]:
    """The values of all processes, by rank."""
    values: list[object] = [value] * size()
    if size() > 1:
        with guarded():
            distributed.all_gather_object(values, value)
    return values


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters are spread over the processes, as FSDP2 does."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def synchronize_(module: nn.Module) -> None:
    """Start every process from the parameters and buffers of the first."""
    if size() > 1 and not is_sharded(module):
        with guarded():
            for tensor in (*module.parameters(), *module.buffers()):
                distributed.broadcast(tensor.detach(), 0)


def average_gradients_(parameters: Iterable[Tensor]) -> None:
    """Average the gradients over the processes, in one exchange per dtype."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in by_kind.values():
        # Not every process need have used every parameter.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        flat = sum_(torch.cat([gradient.reshape(-1) for gradient in gradients])) / size()
        for parameter, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
            parameter.grad = part.view_as(parameter)


def method(module: nn.Module, name: str) -> Callable[..., Tensor]:
    """A method that computes a loss; a sharded module gathers its parameters for it, as it does when called."""
    if is_sharded(module):
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(module, name)
    return cast(Callable[..., Tensor], getattr(module, name))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, which would wait for gradients of what we freeze."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts of module and optimiser, put together on the first process where they are spread over all."""
    if is_sharded(module):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        with guarded():
            return get_state_dict(module, optimizer, options=options)
    return module.state_dict(), optimizer.state_dict()


def load_whole_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, model_state: dict[str, Any], optimizer_state: dict[str, Any]
) -> None:
    """Load what :func:`whole_state` returned, in every process."""
    if is_sharded(module):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            module, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options
        )
    else:
        module.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
