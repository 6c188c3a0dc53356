"""The command line, ``byol-fast`` or ``python -m byol_fast``.

Each command is one function that adds its arguments and one that runs it. Mistakes of the user end in one line on the
standard error that names the file or argument, what was expected and what was found, and exit status 2; Ctrl-C in 130.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ._version import __version__
from .backends import BackendError, backends
from .backends.native import Native

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="byol-fast", description="Bottleneck layers for PyTorch (Bottleneck Yield Optimization Layer)."
    )
    parser.add_argument("--version", action="version", version=f"byol_fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_info, _add_demo):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("byol-fast: interrupted", file=sys.stderr)
        return 130
    except (BackendError, ImportError, OSError, TypeError, ValueError) as error:
        print(f"byol-fast: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_Commands = argparse._SubParsersAction  # the type has no public name


def _add_info(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("info", help="versions, backends, instruction set, threads")
    command.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    lines = {
        "byol_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
    lines |= {f"{name} backend": str(status) for name, status in backends().items()}
    if Native().unavailable() is None:
        native = Native().info()
        sets = ", ".join(native["runnable_instruction_sets"])
        lines["instruction set"] = f"{native['instruction_set']} (this processor runs {sets})"
        lines["thread pool"] = native["thread_pool"]
        lines["compiler"] = native["compiler"]
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


def _add_demo(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "demo", help="pre-train, fine-tune, deploy and reload bottlenecks on real data; prints a table, writes a figure"
    )
    command.add_argument(
        "--data", type=Path, metavar="FILE", help="a matrix of your own (.npy, .npz, .pt, .safetensors, .parquet)"
    )
    command.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="where the figure goes (%(default)s)"
    )
    command.add_argument(
        "--ranks", type=_ranks, default=None, metavar="K,K,…", help="ranks to try, e.g. 8,32 (default: by the data)"
    )
    command.add_argument("--quick", action="store_true", help="fewer rows: a smoke test, in seconds")
    command.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    # The demo needs extras, which the other commands do without.
    from . import demo

    demo.run(options.output, data=options.data, ranks=options.ranks, quick=options.quick)


def _ranks(text: str) -> list[int]:
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1:
        raise argparse.ArgumentTypeError(f"expected ranks ≥ 1 separated by commas, got {text!r}")
    return ranks
