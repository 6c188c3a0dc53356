"""``info``: what this installation is made of."""

from __future__ import annotations

import argparse
import platform

import numpy as np
import torch

from .._version import __version__
from ..backends import BackendStatus, backends, verified
from ..backends.native import Native
from .arguments import Commands

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Declare the command."""
    command = commands.add_parser("info", help="versions, backends, instruction set, threads")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print one fact a line."""
    lines = {
        "byol_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
    lines |= {f"{name} backend": _described(name, status) for name, status in backends().items()}
    if Native().unavailable() is None:
        native = Native().info()
        sets = ", ".join(native["runnable_instruction_sets"])
        lines["instruction set"] = f"{native['instruction_set']} (this processor runs {sets})"
        lines["thread pool"] = native["thread_pool"]
        lines["compiler"] = native["compiler"]
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


def _described(name: str, status: BackendStatus) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    caveat = verified.caveat(name, device) if status.available else None
    return str(status) if caveat is None else f"{status}, {caveat}"
