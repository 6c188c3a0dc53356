"""The command line, ``byol-fast`` or ``python -m byol_fast``.

A command is a file here with a function ``add``, which declares it, and a function ``run``; its name stands in
``_COMMANDS``. Mistakes of the user end in one line on the standard error that names the file or argument, what was
expected and what was found, and exit status 2; Ctrl-C in 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .._version import __version__
from ..backends import BackendError
from . import compress, curve, decode, demo, encode, info, pretrain

__all__ = ["main"]

_COMMANDS = (info, demo, pretrain, curve, encode, decode, compress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="byol-fast", description="Bottleneck layers for PyTorch (Bottleneck Yield Optimization Layer)."
    )
    parser.add_argument("--version", action="version", version=f"byol_fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("byol-fast: interrupted", file=sys.stderr)
        return 130
    except (BackendError, FloatingPointError, ImportError, OSError, TypeError, ValueError) as error:
        print(f"byol-fast: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
