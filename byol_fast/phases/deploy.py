"""Phase three: a file that runs where byol_fast is not installed."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..files import replacing
from ..nn import Bottleneck, BottleneckConv2d, BottleneckEmbedding, SplitAttention
from ..nn.replace import set_module
from . import plain

__all__ = ["deploy", "load"]

_FORMATS = ("safetensors", "state", "onnx", "torch_export")
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def deploy(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    example: Tensor | tuple[Tensor, ...] | None = None,
) -> None:
    """Write a model to one file that needs only torch to run; its bottlenecks become pairs of plain ``nn.Linear``.

    * ``"safetensors"``: tensors, and the model as a small JSON text in the file's header, for a tree of
      ``nn.Sequential``, the layers of torch.nn and bottlenecks. It loads with :func:`load`; where byol_fast is not
      installed, with a copy of ``byol_fast/phases/plain.py``, which imports only torch and documents the format; or,
      with torch and safetensors, so::

          def build(node):
              make = getattr(torch.nn, node["class"])
              if "children" in node:
                  return make(OrderedDict((name, build(child)) for name, child in node["children"].items()))
              return make(**node["arguments"])

          with safetensors.safe_open(path, "pt") as file:
              model = build(json.loads(file.metadata()["byol_fast"])["module"])
              model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})

    * ``"state"``: any model, whose architecture is code: tensors, and a JSON text of what goes in the place of which
      layer. It loads into the model as it was before compression, :func:`load` ``(path, model)``, or with the same copy
      of ``plain.py``.

    * ``"torch_export"``: any model that :func:`torch.export.export` takes; loads with ``torch.export.load(path)``.
    * ``"onnx"``: any model that :func:`torch.onnx.export` takes; runs in onnxruntime.

    The model is deployed as it is in evaluation mode. It stays as it is, and the file is replaced in one step.

    Args:
        model: the model.
        path: file to write.
        format: see above.
        example: input of the model, or a tuple of inputs, for the last two formats, which trace it. Their first
            dimension has to be ≥ 2; the deployed model then takes any number of rows.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model has a part the format cannot hold; the message
            names it.
        ModuleNotFoundError: ``format="onnx"`` without the packages it needs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if format not in _FORMATS:
        raise ValueError(f"format: expected one of {', '.join(_FORMATS)}, got {format!r}")
    if format in ("safetensors", "state"):
        _write_safetensors(model, path, format)
        return
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not all(isinstance(tensor, Tensor) and tensor.dim() for tensor in inputs):
        raise TypeError(f"example: expected an input of the model, to trace it, got {type(example).__name__}")
    if any(len(tensor) < 2 for tensor in inputs):
        raise ValueError(f"example: expected at least two rows, got shapes {[list(tensor.shape) for tensor in inputs]}")
    if format == "onnx":
        _check_onnx()
    model = copy.deepcopy(model).eval()
    rows = torch.export.Dim.DYNAMIC
    # The reference is made of PyTorch's own operations, so nothing of this package remains in the file.
    with use_backend("reference"), torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: rows} for _ in inputs))
        with replacing(path) as temporary:
            if format == "torch_export":
                # Through a file, because a name decides nothing then.
                with open(temporary, "wb") as file:
                    torch.export.save(program, file)
            else:
                exported = torch.onnx.export(program, dynamo=True, verbose=False)
                if exported is None:
                    raise ValueError("model: expected one that torch.onnx can export")
                exported.save(temporary)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """A deployed model, in evaluation mode: of format ``"safetensors"``, ``"state"`` or ``"torch_export"``.

    Args:
        path: file to read.
        model: for format ``"state"``: the model as it was before compression, with any weights, for instance
            ``AutoModel.from_config(config)``. Its layers are replaced, and its tensors are those of the file.

    Only load ``torch_export`` files that you trust, as with :func:`torch.export.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a deployed model, cut short or altered; the message is one line and names the file, what
            was expected and what was found.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        return plain.load(path, model)
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
        if altered is None:
            with open(path, "rb") as stream:
                return torch.export.load(stream).module()
    except Exception as error:
        found = f"{os.path.getsize(path)} bytes that are not one, or are cut short"
        raise ValueError(f"{path}: expected a torch.export file, found {found}") from error
    raise ValueError(f"{path}: expected a torch.export file as it was written, found {altered} altered")


# ------------------------------------------------------------------------------------------------------ safetensors


def _write_safetensors(model: nn.Module, path: str | os.PathLike[str], format: str) -> None:
    from safetensors.torch import save

    model = copy.deepcopy(model)
    if format == "state":
        module = _replacements(model)
    else:
        model = _lowered(model, "model")
        module = _described(model, "model")
    # Copies, because the format has no two names for one tensor.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    entries = {name: _entry(tensor) for name, tensor in tensors.items()}
    description = {
        "version": plain.VERSION,
        "module": module,
        "tensors": entries,
        "sha256": plain.digest(module, entries),
    }
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, {"format": "pt", "byol_fast": json.dumps(description)}))


def _entry(tensor: Tensor) -> dict[str, Any]:
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _replacements(model: nn.Module) -> dict[str, Any]:
    """Lower the bottlenecks of a model, in place; returns which layers have to be replaced by what."""
    replaced = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SplitAttention):
            raise ValueError(
                f"{name}: expected attention as torch.nn has it, got its projections replaced; "
                'deploy it with format="torch_export"'
            )
        if isinstance(layer, (Bottleneck, BottleneckConv2d, BottleneckEmbedding)):
            if not name:
                raise ValueError('model: expected bottlenecks inside of it, got one; use format="safetensors"')
            lowered = _lowered(layer, name)
            replaced[name] = _described(lowered, name)
            set_module(model, layer, lowered)
    return {"class": plain.GIVEN, "replaced": replaced}


def _lowered(module: nn.Module, name: str) -> nn.Module:
    """The same with layers of torch.nn only, and the same names of tensors."""
    if isinstance(module, (BottleneckConv2d, BottleneckEmbedding)):
        return nn.Sequential(OrderedDict(encoder=module.encoder, decoder=module.decoder))
    if isinstance(module, Bottleneck):
        return _lowered_bottleneck(module, name)
    for child_name, child in module.named_children():
        setattr(module, child_name, _lowered(child, f"{name}.{child_name}"))
    return module


def _lowered_bottleneck(layer: Bottleneck, name: str) -> nn.Module:
    if layer.residual:
        raise ValueError(
            f'{name}: expected layers in sequence, got a residual Bottleneck; deploy it with format="torch_export"'
        )
    parts: list[tuple[str, nn.Module]] = [("encoder", layer.encoder)]
    if layer.activation != "identity":
        parts.append(("activation", _ACTIVATIONS[layer.activation]()))
    decoder: nn.Module = layer.decoder
    if layer.tied:
        weight, bias = layer.decoder.weight, layer.decoder.bias
        decoder = nn.Linear(layer.rank, layer.out_features, bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            decoder.weight.copy_(weight)
            if bias is not None:
                decoder.bias.copy_(bias)
    return nn.Sequential(OrderedDict([*parts, ("decoder", decoder)]))


def _described(module: nn.Module, name: str) -> dict[str, Any]:
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        raise ValueError(
            f'{name}: expected a layer without forward hooks, got some; deploy it with format="torch_export"'
        )
    if kind is nn.Sequential:
        children = {
            child_name: _described(child, f"{name}.{child_name}") for child_name, child in module.named_children()
        }
        return {"class": "Sequential", "children": children}
    if kind.__name__ not in plain.LAYERS or getattr(nn, kind.__name__) is not kind:
        raise ValueError(
            f"{name}: expected nn.Sequential, Bottleneck or a plain layer of torch.nn, got {kind.__name__}; "
            'deploy it with format="torch_export"'
        )
    return {"class": kind.__name__, "arguments": _arguments(module)}


def _arguments(module: nn.Module) -> dict[str, Any]:
    """What the layer was made with: torch.nn keeps each argument under its name."""
    arguments = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in ("device", "dtype") and name[0] != "_":
            value = getattr(module, name)
            value = value is not None if name == "bias" else value
            # Defaults go without saying, also in versions of torch that do not know the argument.
            if value != parameter.default:
                arguments[name] = value
    return arguments


def _check_onnx() -> None:
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"format: 'onnx' needs the package {package}: pip install 'byol_fast[onnx]'")
