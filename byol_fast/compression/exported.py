"""A program of ``torch.export`` with its layers as modules again, so that they can be found and replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

__all__ = ["with_layers"]


def with_layers(program: ExportedProgram) -> fx.GraphModule:
    """A module that computes the program, in which linear layers, convolutions and embeddings are those of torch.nn."""
    module = program.module()
    # A plain one: what torch.export returns knows no eval().
    graph_module = fx.GraphModule(module, module.graph)
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            # The guards speak of the inputs of the program, which the new one checks itself.
            graph.erase_node(node)
            continue
        make = _MAKERS.get(node.target) if node.op == "call_function" else None
        if make is not None and not node.kwargs:
            _replace(graph_module, node, make)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()
    return graph_module


def _replace(module: fx.GraphModule, node: fx.Node, make: Callable[..., tuple[nn.Module, fx.Node, str] | None]) -> None:
    made = make(module, *node.args)
    if made is None:
        return
    layer, input, weight_name = made
    # In place of what held the weight, so that names are those of the model that was exported.
    name = weight_name.removesuffix(".weight")
    if name == weight_name:
        name = f"{weight_name}_layer"
    module.set_submodule(name, layer)
    with module.graph.inserting_before(node):
        call = module.graph.call_module(name, (input,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)


def _parameter(module: fx.GraphModule, node: Any) -> nn.Parameter | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, nn.Parameter) else None


def _is_absent_or_parameter(module: fx.GraphModule, node: Any) -> bool:
    return node is None or _parameter(module, node) is not None


def _linear(module: fx.GraphModule, input: fx.Node, weight: Any, bias: Any = None) -> Any:
    matrix = _parameter(module, weight)
    if matrix is None or matrix.dim() != 2 or not _is_absent_or_parameter(module, bias):
        return None
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta")
    return _with_parameters(module, layer, matrix, bias), input, str(weight.target)


def _conv2d(
    module: fx.GraphModule,
    input: fx.Node,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    kernel = _parameter(module, weight)
    if kernel is None or not _is_absent_or_parameter(module, bias):
        return None
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    size: Any = tuple(kernel.shape[2:])
    layer = nn.Conv2d(
        kernel.shape[1] * groups,
        kernel.shape[0],
        size,
        **options,
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    return _with_parameters(module, layer, kernel, bias), input, str(weight.target)


def _embedding(module: fx.GraphModule, weight: Any, input: fx.Node, padding_idx: int = -1, *flags: bool) -> Any:
    table = _parameter(module, weight)
    if table is None or any(flags):
        return None
    layer = nn.Embedding(table.shape[0], table.shape[1], padding_idx if padding_idx >= 0 else None, device="meta")
    return _with_parameters(module, layer, table, None), input, str(weight.target)


def _with_parameters(module: fx.GraphModule, layer: nn.Module, weight: nn.Parameter, bias: Any) -> nn.Module:
    layer.weight = weight
    if bias is not None:
        layer.register_parameter("bias", _parameter(module, bias))
    return layer.eval()


_MAKERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.conv2d.default: _conv2d,
    torch.ops.aten.embedding.default: _embedding,
}
