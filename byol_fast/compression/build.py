"""The copy of the model that is worked on, and models made of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from ..nn import SplitAttention
from ..nn.replace import set_module
from .find import Refusal, Site, find
from .kinds import Factors

__all__ = ["Workpiece"]


class Workpiece:
    """A copy of a model, in evaluation mode and with attention in parts.

    Attributes:
        dense: the copy, with all its dense layers.
        sites: what can be replaced in it, in its order.
        refusals: what cannot.
    """

    def __init__(self, original: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> None:
        self.original = original
        # In a container, so that a model that is itself a layer can be replaced, too.
        self._root = nn.ModuleDict({"model": copy.deepcopy(original).eval()})
        self._attention: dict[SplitAttention, nn.Module] = {}
        self.refusals: list[Refusal] = []
        self._split_attention(wanted)
        self.dense = self._root["model"]
        self.sites, refusals = find(self.dense, wanted)
        self.refusals += refusals

    def _split_attention(self, wanted: Callable[[str, nn.Module], bool]) -> None:
        """Give each ``nn.MultiheadAttention`` its projections as modules."""
        for name, module in list(self._root["model"].named_modules()):
            if type(module) is not nn.MultiheadAttention or not wanted(name, module):
                continue
            if module.bias_k is not None or module.add_zero_attn:
                size = sum(parameter.numel() for parameter in module.parameters())
                reason = "add_bias_kv and add_zero_attn are not those of a bottleneck"
                self.refusals.append(Refusal(name, "MultiheadAttention", size, reason))
                continue
            split = SplitAttention(module)
            self._attention[split] = module
            set_module(self._root, module, split)

    def build(self, factors: Mapping[Site, Factors]) -> tuple[nn.Module, list[Site]]:
        """A copy with bottlenecks of these factors, and their places in it, in the same order."""
        root = copy.deepcopy(self._root)
        names = {id(module): name for name, module in self._root.named_modules()}
        replaced = []
        for site, cut in factors.items():
            places = [root.get_submodule(names[id(module)]) for module in site.modules]
            layers = [site.kind.replacement(place, cut) for place in places]
            for place, layer in zip(places, layers, strict=True):
                # Those that shared a weight share its factors.
                for part in ("encoder", "decoder"):
                    layer.get_submodule(part).weight = layers[0].get_submodule(part).weight
                layer.eval().requires_grad_(bool(place.weight.requires_grad))
                set_module(root, place, layer)
            replaced.append(replace(site, modules=tuple(layers)))
        for split, original in self._attention.items():
            copied = root.get_submodule(names[id(split)])
            if all(isinstance(child, nn.Linear) for child in copied.children()):
                # None of it was replaced: it stays what it was.
                set_module(root, copied, copy.deepcopy(original))
        _leave_fast_paths(root)
        return root["model"], replaced

    def as_given(self) -> nn.Module:
        """A copy of the model in evaluation mode, with its fast paths: what has to be beaten."""
        return copy.deepcopy(self.original).eval()

    def with_modes(self, model: nn.Module) -> nn.Module:
        """A built model in the modes of the original."""
        modules = dict(model.named_modules())
        for name, module in self.original.named_modules():
            if name in modules and type(modules[name]) is type(module):
                modules[name].training = module.training
            elif name in modules:
                modules[name].train(module.training)
        return model


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch.nn's transformer layers from reading the weights of layers that are not there any more."""
    changed = False
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            parts = (module.linear1, module.linear2)
            if isinstance(module.self_attn, SplitAttention) or not all(isinstance(part, nn.Linear) for part in parts):
                # What the layer itself writes here where its activation has no fast path.
                module.activation_relu_or_gelu = 0
                changed = True
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and changed:
            module.use_nested_tensor = False
