"""One file that a run can be continued from.

It is a :func:`torch.save` file that takes the place of its predecessor in one step, so it is always whole. Under the
key ``"model"`` it holds what is trained, for use without this package:
``module.load_state_dict(torch.load(path)["model"])``.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ..files import replacing

__all__ = ["check_same_run", "load_checkpoint", "save_checkpoint"]

_KEY = "byol_fast_checkpoint"
_VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write the state of a run: tensors, numbers, strings and containers of them."""
    with replacing(path) as temporary:
        torch.save({_KEY: _VERSION, **state}, temporary)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a run, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or damaged; the message is one line and names the file.
    """
    expected = f"{path}: expected a byol_fast checkpoint of version {_VERSION}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{expected}, found {os.path.getsize(path)} bytes that are not one ({reason})") from error
    if not isinstance(state, dict) or _KEY not in state:
        raise ValueError(f"{expected}, found a {type(state).__name__} of something else")
    if state[_KEY] != _VERSION:
        raise ValueError(f"{expected}, found version {state[_KEY]}")
    return state


def check_same_run(path: str | os.PathLike[str], expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError where a run is continued with other arguments or data than it was begun with."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path}: expected a checkpoint of a run with {name} = {value!r}, found {found.get(name)!r}"
            )
