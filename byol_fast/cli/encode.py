"""``encode``: rows become codes."""

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
    command = commands.add_parser("encode", help="rows to codes, by a bottleneck that pretrain wrote")
    command.add_argument("model", type=Path, metavar="MODEL", help="what pretrain wrote")
    add_data(command)
    add_output(command, "codes, [rows, rank]")
    command.add_argument(
        "--rank",
        type=int,
        metavar="K",
        help="only the first K numbers of each code, the best K there are (default: all; linear bottlenecks only)",
    )
    add_device(command)
    command.set_defaults(run=run)


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Encode block by block."""
    model = load_halves(options.model, options.device)
    rank = model.rank if options.rank is None else model.checked_rank(options.rank, "--rank")
    stream = Stream(open_matrix(options.data, name=options.name), "encode")
    features = model.encoder.in_features
    if stream.matrix.shape[1] != features:
        found = stream.matrix.shape[1]
        raise ValueError(f"{options.data}: expected {features} columns, as {options.model} was trained on, got {found}")
    codes = (model.encode(block.to(options.device, model.dtype), rank) for block in stream)
    write_matrix(options.output, codes, (len(stream.matrix), rank), model.dtype)
    print(f"{stream.speed()}\ncodes: {options.output}, {features / rank:.4g} numbers became 1")
