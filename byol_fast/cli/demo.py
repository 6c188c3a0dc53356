"""``demo``: all of it on real data."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Commands, ranks

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Declare the command."""
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
        "--ranks", type=ranks, default=None, metavar="K,K,…", help="ranks to try, e.g. 8,32 (default: by the data)"
    )
    command.add_argument("--quick", action="store_true", help="fewer rows: a smoke test, in seconds")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the demonstration."""
    # It needs extras, which the other commands do without.
    from .. import demo

    demo.run(options.output, data=options.data, ranks=options.ranks, quick=options.quick)
