"""What commands have in common: types of arguments."""

from __future__ import annotations

import argparse
from typing import TypeAlias

__all__ = ["Commands", "ranks"]

# The type has no public name.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def ranks(text: str) -> list[int]:
    """``8,32`` as ``[8, 32]``."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected ranks ≥ 1 separated by commas, got {text!r}")
    return values
