"""Bottlenecks in place of layers of a model, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, cast

import torch
from torch import nn

from ..svd import checked_rank
from .bottleneck import Bottleneck
from .conv import BottleneckConv2d
from .embedding import BottleneckEmbedding

__all__ = ["Names", "matching", "merge", "replace_linear", "set_module"]

Names: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]


def replace_linear(model: nn.Module, names: Names, rank: int, **options: object) -> nn.Module:
    """Put a fresh :class:`byol_fast.Bottleneck` in place of linear layers, in place: to train at low rank from scratch.

    A layer that has several places in the model, or shares its weight with another, gives way to one bottleneck with as
    many places, or to bottlenecks that share their weights.

    Args:
        model: any model.
        names: names of ``nn.Linear`` modules, as ``named_modules`` has them, or a predicate ``(name, module)``, asked
            for each ``nn.Linear``.
        rank: from 1 to min(in_features, out_features) of each.
        options: further arguments of :class:`byol_fast.Bottleneck`: activation, residual, tied.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is no module, or ``rank`` no integer.
        ValueError: a name is none of a linear layer, none matched, or ``rank`` does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = {name: linears[name] for name in matching("names", names, linears)}
    if not chosen:
        raise ValueError(f"names: expected one or more of {', '.join(linears) or 'none'}, got none that matched")
    if "" in chosen:
        raise ValueError("model: expected linear layers inside of it, got one; make a Bottleneck")
    for name, linear in chosen.items():
        checked_rank(rank, min(linear.weight.shape), f"min(in_features, out_features) of {name}")
    made: dict[int, Bottleneck] = {}
    for linear in chosen.values():
        weight = linear.weight
        layer = Bottleneck(
            linear.in_features,
            rank,
            linear.out_features,
            bias=linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **options,  # type: ignore[arg-type]
        ).train(linear.training)
        first = made.setdefault(id(weight), layer)
        if first is not layer:
            layer.encoder.weight = first.encoder.weight
            if isinstance(layer.decoder, nn.Linear):
                layer.decoder.weight = cast(nn.Linear, first.decoder).weight
        set_module(model, linear, layer)
    return model


@torch.no_grad()
def merge(model: nn.Module, names: Names | None = None) -> nn.Module:
    """Put dense layers back where a bottleneck has no fewer weights than the dense layer: from the break-even rank on.

    Args:
        model: any model; changed in place.
        names: merge these bottlenecks instead, whatever their rank; or a predicate ``(name, module)``.

    Returns:
        The model, or the dense layer if ``model`` was one bottleneck itself.

    Raises:
        ValueError: a name is none of a bottleneck, or the bottleneck has an activation, which no dense layer computes.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BOTTLENECKS)}
    if names is None:
        chosen = [name for name, layer in layers.items() if _is_linear(layer) and _is_above_break_even(layer)]
    else:
        chosen = matching("names", names, layers)
    for name in chosen:
        dense = _dense(layers[name])
        if name == "":
            return dense
        set_module(model, layers[name], dense)
    return model


_BOTTLENECKS = (Bottleneck, BottleneckConv2d, BottleneckEmbedding)
_AnyBottleneck: TypeAlias = Bottleneck | BottleneckConv2d | BottleneckEmbedding


def _dense(layer: _AnyBottleneck) -> nn.Module:
    if isinstance(layer, Bottleneck):
        return layer.to_linear()
    if isinstance(layer, BottleneckConv2d):
        return layer.to_conv2d()
    return layer.to_embedding()


def _is_linear(layer: nn.Module) -> bool:
    return getattr(layer, "activation", "identity") == "identity"


def _is_above_break_even(layer: _AnyBottleneck) -> bool:
    encoder, decoder = layer.encoder.weight, layer.decoder.weight
    if isinstance(layer, BottleneckEmbedding):
        dense = encoder.shape[0] * decoder.shape[0]
    else:
        # A group's kernel weights for each output.
        dense = decoder.shape[0] * (encoder.numel() // encoder.shape[0])
    tied = isinstance(layer, Bottleneck) and layer.tied
    return encoder.numel() + (0 if tied else decoder.numel()) >= dense


def matching(argument: str, names: Names, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of ``modules`` that are meant.

    Raises:
        ValueError: a name is none of them.
    """
    if callable(names):
        return [name for name, module in modules.items() if names(name, module)]
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in modules:
            known = ", ".join(modules) or "none"
            raise ValueError(f"{argument}: expected names of {known}, got {name!r}")
    return wanted


def set_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place of the model that holds ``old``."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
