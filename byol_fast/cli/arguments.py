"""What commands have in common: arguments and their types."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

import torch

__all__ = ["Commands", "add_data", "add_device", "add_output", "ranks"]

# The type has no public name.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_FORMATS = ".npy, .npz, .pt, .safetensors or .parquet"


def add_data(command: argparse.ArgumentParser, name: str = "data", what: str = "the rows, a matrix") -> None:
    """The file to read, and which of its arrays."""
    command.add_argument(name, type=Path, metavar=name.upper(), help=f"{what} in {_FORMATS}")
    command.add_argument("--name", help="which array or column of the file (default: its only matrix)")


def add_output(command: argparse.ArgumentParser, what: str) -> None:
    """The file to write."""
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=f"{what}, written to {_FORMATS}"
    )


def add_device(command: argparse.ArgumentParser) -> None:
    """Where to compute."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", type=torch.device, default=default, help="where to compute (%(default)s)")


def ranks(text: str) -> list[int]:
    """``8,32`` as ``[8, 32]``."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected ranks ≥ 1 separated by commas, got {text!r}")
    return values
