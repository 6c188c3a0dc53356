"""Recovery: the bottlenecks learn from the dense model, layer by layer, then all together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..nn import Bottleneck
from .find import Site
from .statistics import hooked

__all__ = ["Recovery", "recover"]


@dataclass(frozen=True)
class Recovery:
    """How to recover.

    Args:
        layer_epochs: passes over the data in which each linear bottleneck learns the output of its dense layer, from
            the inputs that it gets in the compressed model, by :meth:`byol_fast.Bottleneck.reconstruction_loss`.
        epochs: passes in which all of them learn the output of the dense model (distillation).
        hints: weight, beside the error of that output, of the mean error of the outputs of the replaced layers, which
            distillation then learns too (FitNets, Romero et al., ICLR 2015). They make up for data there is too little
            of in a deep model; a model cut so far that its layers cannot be what they were is better without.
        lr: learning rate of Adam; it rises over the first tenth of the steps and falls to zero by a cosine.
        train: ``"bottlenecks"``, or ``"all"`` parameters of the model, in distillation.
        data: further batches to learn from, as ``calibration`` (they need no labels); None means the calibration
            batches.
        held_out: share of the batches to measure by, and not to learn from.
        patience: epochs without a smaller held-out error after which training stops; the best is kept, and that is what
            was there before training if nothing was better.
        seed: of the order of batches.
    """

    layer_epochs: int = 0
    epochs: int = 10
    hints: float = 0.0
    lr: float = 1e-3
    train: str = "bottlenecks"
    data: Any = None
    held_out: float = 0.125
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layer_epochs", "epochs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected an integer ≥ 0, got {value!r}")
        if not self.hints >= 0:
            raise ValueError(f"hints: expected a number ≥ 0, got {self.hints!r}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a number > 0, got {self.lr!r}")
        if self.train not in ("bottlenecks", "all"):
            raise ValueError(f"train: expected one of bottlenecks, all, got {self.train!r}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a number in [0, 1), got {self.held_out!r}")


Forward = Callable[[nn.Module, Any], Tensor]
Loss = Callable[[Any], Tensor]


def recover(
    model: nn.Module,
    teacher: nn.Module,
    sites: Sequence[Site],
    replaced: Sequence[Site],
    batches: Sequence[Any],
    forward: Forward,
    options: Recovery,
    progress: bool,
) -> list[dict[str, float]]:
    """Train ``model`` in place, in evaluation mode; returns a row an epoch.

    Args:
        sites: the dense layers, in ``teacher``.
        replaced: the bottlenecks in their places, in ``model``, in the same order.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    count = math.floor(options.held_out * len(batches))
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(batches), generator=generator).tolist()
    train, held_out = [batches[i] for i in order[count:]], [batches[i] for i in order[:count]]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    parameters = _trained(model, replaced, options.train)
    history: list[dict[str, float]] = []
    total = (options.layer_epochs + options.epochs) * len(train)
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is other for other in parameters))
        with tqdm(total=total, desc="recover", unit="step", disable=None if progress else True) as bar:
            layers = _Layerwise(model, teacher, sites, replaced, forward)
            whole = _Distillation(model, teacher, sites, replaced, forward, options.hints)
            phases: list[tuple[str, int, Loss, Loss]] = [
                ("layers", options.layer_epochs, layers, layers),
                ("model", options.epochs, whole, whole.error),
            ]
            for name, epochs, loss, error in phases:
                if epochs:
                    history += _run(
                        name, model, parameters, train, held_out, epochs, loss, error, options, generator, bar
                    )
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
    return history


def _trained(model: nn.Module, replaced: Sequence[Site], which: str) -> list[nn.Parameter]:
    modules = [model] if which == "all" else [module for site in replaced for module in site.modules]
    found = {id(p): p for module in modules for p in module.parameters() if p.is_floating_point()}
    return list(found.values())


def _run(
    name: str,
    model: nn.Module,
    parameters: list[nn.Parameter],
    train: Sequence[Any],
    held_out: Sequence[Any],
    epochs: int,
    loss_of: Loss,
    error_of: Loss,
    options: Recovery,
    generator: torch.Generator,
    bar: Any,
) -> list[dict[str, float]]:
    optimizer = torch.optim.Adam(parameters, lr=options.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=epochs * len(train)))
    history: list[dict[str, float]] = []
    best, best_error, since = copy.deepcopy(model.state_dict()), _mean(error_of, held_out), 0
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(train), generator=generator).tolist():
            optimizer.zero_grad()
            loss = loss_of(train[index])
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"recover: expected a finite loss, got {loss.item()}; try a smaller lr")
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            bar.update()
        row = {"epoch": epoch + 1.0, f"{name}_loss": total / max(len(train), 1)}
        if held_out:
            error = _mean(error_of, held_out)
            row[f"{name}_held_out_error"] = error
            since = 0 if error < best_error else since + 1
            if error < best_error:
                best, best_error = copy.deepcopy(model.state_dict()), error
        history.append(row)
        if held_out and since >= options.patience:
            bar.total -= (epochs - epoch - 1) * len(train)
            break
    if held_out:
        model.load_state_dict(best)
    return history


@torch.no_grad()
def _mean(error_of: Loss, batches: Sequence[Any]) -> float:
    return sum(float(error_of(batch)) for batch in batches) / max(len(batches), 1)


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: Adam's first steps know no scale of the gradients yet, and undo a good start if large."""
    warm = max(steps // 10, 1)
    return min((step + 1) / warm, 1.0) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def _relative(output: Tensor, target: Tensor) -> Tensor:
    """Squared error over the energy of the target."""
    return (output - target).square().sum() / target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)


@contextmanager
def _outputs(sites: Sequence[Site]) -> Iterator[list[Tensor]]:
    """What each call of the sites gives, in the order of the calls."""
    found: list[Tensor] = []

    def keep(site: Site, module: nn.Module, input: Tensor, output: Tensor) -> None:
        found.append(output)

    with hooked(list(sites), keep):
        yield found


@dataclass(frozen=True)
class _Distillation:
    """The error of the model's output and, with hints, the mean error of its replaced layers' outputs."""

    model: nn.Module
    teacher: nn.Module
    sites: Sequence[Site]
    replaced: Sequence[Site]
    forward: Forward
    hints: float

    def __call__(self, batch: Any) -> Tensor:
        if not self.hints:
            return self.error(batch)
        with torch.no_grad(), _outputs(self.sites) as targets:
            target = self.forward(self.teacher, batch)
        with _outputs(self.replaced) as outputs:
            output = self.forward(self.model, batch)
        errors = [_relative(*pair) for pair in zip(outputs, targets, strict=True)]
        # No layer has to be called for every batch.
        return _relative(output, target) + self.hints * sum(errors) / max(len(errors), 1)

    def error(self, batch: Any) -> Tensor:
        """Of the model's output."""
        with torch.no_grad():
            target = self.forward(self.teacher, batch)
        return _relative(self.forward(self.model, batch), target)


class _Layerwise:
    """The mean over layers of each one's squared error over the energy of its dense output."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module, sites: Sequence[Site], replaced: Sequence[Site], forward: Forward
    ) -> None:
        pairs = [
            (dense, site) for dense, site in zip(sites, replaced, strict=True) if type(site.modules[0]) is Bottleneck
        ]
        self.model, self.teacher, self.forward = model, teacher, forward
        self.dense = [dense for dense, _ in pairs]
        self.bottlenecks = [site for _, site in pairs]

    def __call__(self, batch: Any) -> Tensor:
        inputs: list[tuple[Bottleneck, Tensor]] = []

        def input_of(site: Site, module: nn.Module, input: Tensor, output: Tensor) -> None:
            if isinstance(module, Bottleneck):
                inputs.append((module, input.detach()))

        with torch.no_grad():
            with _outputs(self.dense) as targets:
                self.forward(self.teacher, batch)
            with hooked(self.bottlenecks, input_of):
                self.forward(self.model, batch)
        losses = [
            layer.reconstruction_loss(input, target) / target.square().mean().clamp(min=torch.finfo(target.dtype).tiny)
            for (layer, input), target in zip(inputs, targets, strict=True)
        ]
        return torch.stack(losses).mean() if losses else torch.zeros((), requires_grad=True)
