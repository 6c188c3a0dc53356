"""``decode``: codes become rows again."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..data import open_matrix, write_matrix
from .arguments import Commands, add_data, add_device, add_output
from .model import load_halves
from .stream import Stream

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Declare the command."""
    command = commands.add_parser("decode", help="codes to rows, by the bottleneck that encoded them")
    command.add_argument("model", type=Path, metavar="MODEL", help="what pretrain wrote")
    add_data(command, "codes", "what encode wrote, of the full or a smaller rank,")
    add_output(command, "rows, [rows, columns of the data]")
    add_device(command)
    command.set_defaults(run=run)


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Decode block by block."""
    model = load_halves(options.model, options.device)
    stream = Stream(open_matrix(options.codes, name=options.name), "decode")
    model.checked_rank(stream.matrix.shape[1], str(options.codes))
    rows = (model.decode(block.to(options.device, model.dtype)) for block in stream)
    write_matrix(options.output, rows, (len(stream.matrix), model.decoder.out_features), model.dtype)
    print(f"{stream.speed()}\nrows: {options.output}")
