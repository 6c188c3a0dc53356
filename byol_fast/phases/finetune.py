"""Phase two: train a model on its task, while its bottlenecks stay as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import Bottleneck
from . import processes
from .batches import Data, training_and_validation
from .loop import History, Loop, MakeOptimizer, MakeScheduler, Options, last

__all__ = ["FinetuneResult", "finetune"]


@dataclass(frozen=True)
class FinetuneResult:
    """What :func:`finetune` did.

    Attributes:
        model: the model that was given, trained in place.
        history: a table, one dictionary an epoch, as of :class:`PretrainResult`.
        frozen: names of the parameters that were frozen, and found bit-identical at the end.
    """

    model: nn.Module
    history: History
    frozen: tuple[str, ...]

    @property
    def loss(self) -> float:
        """Mean loss over the last epoch's batches; NaN if there was none."""
        return last(self.history)


def finetune(
    model: nn.Module,
    data: Data,
    *,
    loss: Callable[..., Tensor],
    freeze: str | Iterable[str] = "bottlenecks",
    epochs: int = 10,
    batch_size: int | None = 128,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    validation: Data | float | None = None,
    patience: int | None = None,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> FinetuneResult:
    """Minimise ``loss(model(input), target)`` over the data, in place, with parts of the model frozen.

    Frozen parameters are checked, not just marked: they are in no optimiser, have no gradient after any backward pass,
    and at the end their bits are what they were. Afterwards every ``requires_grad`` is as before.

    Interrupting, resuming and several processes work as in :func:`pretrain`; of DistributedDataParallel, the model
    inside is taken.

    Args:
        model: any model.
        data: ``(inputs, targets)`` as tensors or arrays, a Dataset, or a DataLoader. A batch is the model's input and
            whatever else ``loss`` takes.
        loss: ``loss(output, *targets)``, for instance ``torch.nn.functional.cross_entropy``: a mean over the batch.
        freeze: ``"bottlenecks"``, every :class:`byol_fast.Bottleneck` in the model; ``"none"``; or names of submodules.
        epochs, batch_size, optimizer, scheduler, validation, patience, clip_norm, autocast, seed, checkpoint,
            checkpoint_every, resume, progress: as in :func:`pretrain`. The optimiser gets the parameters not frozen.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: a frozen parameter is in the optimiser, got a gradient, or changed.
        FloatingPointError: the loss became NaN or infinite. The last checkpoint is from before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = processes.unwrapped(model)
    if not callable(loss):
        raise TypeError(f"loss: expected a function of output and target, got {type(loss).__name__}")
    options = Options(
        epochs,
        optimizer,
        scheduler,
        patience,
        clip_norm,
        autocast,
        seed,
        checkpoint,
        checkpoint_every,
        resume,
        progress,
    )
    train, held_out = training_and_validation(data, validation, batch_size, seed)
    frozen = _parameters_of(_frozen_modules(model, freeze))
    names = tuple(name for name, parameter in model.named_parameters() if id(parameter) in frozen)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        guard = _Guard({name: parameter for name, parameter in model.named_parameters() if id(parameter) in frozen})

        def loss_of(input: Tensor, *targets: Tensor) -> Tensor:
            return loss(model(input), *targets)

        loop = Loop({"phase": "finetune"}, model, loss_of, options, [trained], after_backward=guard.check_gradients)
        guard.check_optimizer(loop.optimizer)
        loop.prepare = guard.remember
        history = loop.run(train, held_out)
        guard.check_optimizer(loop.optimizer)
        guard.check_bits()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return FinetuneResult(model, history, names)


class _Guard:
    """What has to hold of frozen parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.copies: dict[str, Tensor] = {}
        for parameter in parameters.values():
            # A gradient from before is none of this run's.
            parameter.grad = None

    def remember(self) -> None:
        self.copies = {name: _bits(parameter).clone() for name, parameter in self.parameters.items()}

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._check(
            [name for name, parameter in self.parameters.items() if id(parameter) in held],
            "to be in no optimiser, found {} in one",
        )

    def check_gradients(self) -> None:
        self._check(
            [name for name, parameter in self.parameters.items() if parameter.grad is not None],
            "to get no gradient, found one of {}",
        )

    def check_bits(self) -> None:
        self._check(
            [name for name, copy in self.copies.items() if not torch.equal(copy, _bits(self.parameters[name]))],
            "to keep their bits, found {} changed",
        )

    @staticmethod
    def _check(names: list[str], what: str) -> None:
        if names:
            raise RuntimeError(f"freeze: expected frozen parameters {what.format(', '.join(names))}")


def _bits(parameter: Tensor) -> Tensor:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    # As bytes, NaN is equal to itself and 0 differs from −0.
    return local.detach().contiguous().view(-1).view(torch.uint8)


def _frozen_modules(model: nn.Module, freeze: str | Iterable[str]) -> list[nn.Module]:
    if freeze == "none":
        return []
    if freeze == "bottlenecks":
        return [module for module in model.modules() if isinstance(module, Bottleneck)]
    modules = dict(model.named_modules())
    names = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    for name in names:
        if name not in modules:
            known = ", ".join(name for name in modules if name) or "none"
            raise ValueError(f'freeze: expected "bottlenecks", "none" or names of submodules ({known}), got {name!r}')
    return [modules[name] for name in names]


def _parameters_of(modules: Iterable[nn.Module]) -> dict[int, nn.Parameter]:
    return {id(parameter): parameter for module in modules for parameter in module.parameters()}
