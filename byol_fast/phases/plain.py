"""Load a deployed model with torch alone.

This file imports nothing but torch and the standard library, so that a copy of it can go with a deployed model to where
byol_fast is not installed: ``from plain import load; model = load("model.safetensors")``.

A deployed file is an ordinary safetensors file. In its header, under ``__metadata__``, the key ``byol_fast`` has a JSON
text with

* ``version``: of this format, 1;
* ``module``: the model as a tree; a leaf is ``{"class": name in torch.nn, "arguments": {...}}``, a branch is
  ``{"class": "Sequential", "children": {name: ..., ...}}``; of a model whose architecture is code, it is
  ``{"class": "Given", "replaced": {name of a module: tree to put in its place, ...}}``;
* ``tensors``: for each tensor its ``dtype``, ``shape`` and ``sha256`` (of its bytes);
* ``sha256``: of the JSON text of ``[module, tensors]`` with sorted keys.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

VERSION = 1
GIVEN = "Given"
LAYERS = (
    *("Linear", "Bilinear", "Embedding", "Flatten", "Unflatten", "Identity"),
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("MaxPool1d", "MaxPool2d", "AvgPool1d", "AvgPool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d"),
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "GroupNorm", "RMSNorm"),
    *("ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Tanh", "Sigmoid", "Softplus", "Softmax"),
    *("LogSoftmax", "Hardswish", "Dropout", "Dropout1d", "Dropout2d", "PixelShuffle", "Upsample"),
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The deployed model, in evaluation mode, on the CPU.

    Args:
        path: file to read.
        model: where the file says ``Given``: the model whose layers are replaced and whose tensors are set.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a deployed model, cut short, altered, or of another version; the message is one line.
    """
    description, tensors = _read(path)
    module = description["module"]
    if (model is not None) != (module["class"] == GIVEN):
        wanted = "model=… with it, the model before compression" if model is None else "no model with it"
        raise ValueError(f"{path}: expected {wanted}, got {type(model).__name__}")
    with torch.device("meta"):
        model = _built(path, module) if model is None else _replaced(path, model, module["replaced"])
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: expected the tensors of its model, found others ({' '.join(str(error).split())})"
        ) from None
    return model.requires_grad_(False).eval()


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with open(path, "rb") as file:
        # torch warns about memory it must not write; a bytearray is writable.
        content = bytearray(file.read())
    expected = f"{path}: expected a model deployed by byol_fast"
    length = int.from_bytes(content[:8], "little")
    try:
        if len(content) < 8 + length or length < 2:
            raise ValueError
        header = json.loads(content[8 : 8 + length].decode())
        description = json.loads(header.pop("__metadata__")["byol_fast"])
        version, digests = description["version"], description["tensors"]
        spans = {
            name: (entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]) for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{expected}, found {len(content)} bytes that are not one, or are cut short") from None
    if version != VERSION:
        raise ValueError(f"{expected} in format version {VERSION}, found version {version}")
    size = 8 + length + max((span[0][1] for span in spans.values()), default=0)
    if len(content) != size:
        raise ValueError(f"{expected} of {size} bytes, found {len(content)} bytes")
    if description["sha256"] != digest(description["module"], digests) or digests.keys() != spans.keys():
        raise ValueError(f"{expected} whose description has the sha256 it names, found an altered one")
    tensors = {}
    for name, ((start, stop), dtype, shape) in spans.items():
        data = memoryview(content)[8 + length + start : 8 + length + stop]
        found = hashlib.sha256(data).hexdigest()
        if found != digests[name]["sha256"] or list(shape) != digests[name]["shape"]:
            raise ValueError(f"{expected} with sha256 {digests[name]['sha256'][:12]}… for {name}, found {found[:12]}…")
        tensors[name] = (
            torch.frombuffer(data, dtype=dtype).reshape(shape) if len(data) else torch.empty(shape, dtype=dtype)
        )
        # Tensors in a file need not be where a processor likes them.
        tensors[name] = tensors[name].clone()
    return description, tensors


def digest(module: Any, tensors: Any) -> str:
    """What ``sha256`` in the description has to be."""
    return hashlib.sha256(json.dumps([module, tensors], sort_keys=True).encode()).hexdigest()


def _replaced(path: str | os.PathLike[str], model: nn.Module, nodes: dict[str, Any]) -> nn.Module:
    """The given model with other layers in the places of these names, and wherever else it holds the same ones."""
    for name, node in nodes.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{path}: expected a model with a module {name}, got {type(model).__name__}") from None
        new = _built(path, node)
        for parent in list(model.modules()):
            for child_name, child in list(parent._modules.items()):
                if child is old:
                    setattr(parent, child_name, new)
    return model


def _built(path: str | os.PathLike[str], node: dict[str, Any]) -> nn.Module:
    if node["class"] == "Sequential":
        return nn.Sequential(OrderedDict((name, _built(path, child)) for name, child in node["children"].items()))
    if node["class"] not in LAYERS:
        raise ValueError(f"{path}: expected layers of torch.nn that byol_fast deploys, found {node['class']!r}")
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in node["arguments"].items()}
    try:
        module: nn.Module = getattr(nn, node["class"])(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{path}: expected layers of torch {torch.__version__}, found another kind ({error})"
        ) from None
    return module
