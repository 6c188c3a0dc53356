"""Packages that only the demonstration needs."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["required"]


def required(module: str, package: str) -> Any:
    """The module, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{package}: expected it to be installed for the demo (pip install 'byol_fast[demo]'), found {error}"
        ) from error
