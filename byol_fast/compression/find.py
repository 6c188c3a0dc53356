"""Which layers of a model can be replaced, and why others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from .kinds import Kind, kind_of

__all__ = ["Choice", "Refusal", "Site", "chosen", "find"]

Choice: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True, eq=False)
class Site:
    """A weight of the model, and the layers that use it: more than one where it is shared."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    kind: Kind

    @property
    def name(self) -> str:
        """That of the first layer, with how many others share its weight."""
        first = self.names[0] or "(model)"
        return first if len(self.names) == 1 else f"{first} (and {len(self.names) - 1} more)"

    @property
    def matrix(self) -> Tensor:
        """``[groups, o, d]``."""
        return self.kind.matrix(self.modules[0]).detach()

    @property
    def size(self) -> int:
        """Weights of the dense layer."""
        return self.matrix.numel()

    @property
    def max_rank(self) -> int:
        """Of the matrix of a group."""
        return min(self.matrix.shape[1:])

    @property
    def unit(self) -> int:
        """Weights of one rank."""
        groups, outputs, inputs = self.matrix.shape
        return groups * (outputs + inputs)


@dataclass(frozen=True)
class Refusal:
    """A layer that stays as it is."""

    name: str
    kind: str
    size: int
    reason: str


def chosen(include: Choice, exclude: Choice) -> Callable[[str, nn.Module], bool]:
    """Whether the user wants a layer replaced. A name means the module and everything inside of it."""
    included, excluded = _predicate(include, True), _predicate(exclude, False)
    return lambda name, module: included(name, module) and not excluded(name, module)


def _predicate(choice: Choice, default: bool) -> Callable[[str, nn.Module], bool]:
    if choice is None:
        return lambda name, module: default
    if callable(choice):
        return choice
    names = (choice,) if isinstance(choice, str) else tuple(choice)
    return lambda name, module: any(name == part or name.startswith(f"{part}.") for part in names)


def find(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> tuple[list[Site], list[Refusal]]:
    """The layers that can be replaced, in the order of the model, those with one weight together; and the others."""
    owners = _owners(model)
    groups: dict[int, list[tuple[str, nn.Module, Kind]]] = {}
    refusals = []
    for name, module in model.named_modules():
        if not wanted(name, module):
            continue
        kind = kind_of(module)
        reason = _unknown(module) if kind is None else _refused(module, kind)
        if reason is not None:
            refusals.append(Refusal(name, type(module).__name__, _size(module), reason))
        elif kind is not None:
            groups.setdefault(id(module.weight), []).append((name, module, kind))
    sites = []
    for weight, members in groups.items():
        names, modules, kinds = zip(*members, strict=True)
        others = [name for name, module in owners[weight] if module not in modules]
        mixed = len({kind.title for kind in kinds}) > 1
        if others or mixed:
            shared = ", ".join(others or names[1:])
            reason = f"its weight is shared with {shared}, which cannot share its bottleneck"
            refusals += [Refusal(n, k.title, _size(m), reason) for n, m, k in members]
        else:
            sites.append(Site(names, modules, kinds[0]))
    return sites, refusals


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Which modules hold each parameter, and under which name."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((f"{module_name}.{name}".lstrip("."), module))
    return owners


def _size(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else 0


def _unknown(module: nn.Module) -> str | None:
    """Why a layer that looks as if it could be replaced cannot; None where it does not even look so."""
    if "quantized" in type(module).__module__ and hasattr(module, "weight"):
        return f"{type(module).__name__} is quantised: it has no floating-point weight"
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
        return f"{type(module).__name__} is a subclass, whose forward may do more than its parent's"
    return None


def _refused(module: nn.Module, kind: Kind) -> str | None:
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        return f"its weight is no floating-point parameter, but {found}"
    if weight.is_meta:
        return "its weight is on the meta device: there are no numbers to compress"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in module.__dict__:
        return "it has hooks, which would be lost"
    return kind.refuses(module)
