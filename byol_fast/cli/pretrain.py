"""``pretrain``: a file of rows becomes a file with a bottleneck; also under ``torchrun``."""

from __future__ import annotations

import argparse
import csv
import functools
import math
import sys
from pathlib import Path

import torch

from ..data import FileMatrix, open_matrix
from ..files import replacing
from ..nn import Bottleneck
from ..phases import PretrainResult, deploy, pretrain, processes
from ..rows import RowMatrix
from .arguments import Commands, add_data, add_device
from .stream import speed

__all__ = ["add", "run"]

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64)}


def add(commands: Commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "pretrain",
        help="train a bottleneck to reconstruct the rows of a file; under torchrun, by several processes",
        epilog="A linear bottleneck is solved exactly, in one pass. Ctrl-C leaves a checkpoint; --resume goes on.",
    )
    add_data(command)
    command.add_argument("--rank", type=int, required=True, metavar="K", help="numbers in a code")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("bottleneck.safetensors"),
        metavar="FILE",
        help="the trained model, for encode, decode and byol_fast.load (%(default)s)",
    )
    command.add_argument("--method", default="auto", help="auto, exact, alternate or joint (%(default)s)")
    command.add_argument(
        "--activation", default="identity", help="identity, relu, gelu, gelu_tanh, silu or tanh (%(default)s)"
    )
    command.add_argument("--no-bias", action="store_true", help="neither encoder nor decoder gets a bias")
    command.add_argument("--tied", action="store_true", help="the decoder is the transposed encoder")
    command.add_argument(
        "--dtype", choices=_DTYPES, help="of the model (default: float64 for float64 and wide integers, else float32)"
    )
    command.add_argument("--epochs", type=int, default=100, help="passes over the rows, at most (%(default)s)")
    command.add_argument("--batch-size", type=int, default=1024, help="rows of a step (%(default)s)")
    command.add_argument("--lr", type=float, default=1e-3, help="step size of Adam (%(default)s)")
    command.add_argument("--stop-at", type=float, metavar="C", help="stop at this loss / best possible loss, e.g. 1.01")
    command.add_argument("--validation", type=float, metavar="SHARE", help="hold back this share of the rows")
    command.add_argument("--patience", type=int, metavar="EPOCHS", help="stop after so many without improvement")
    command.add_argument("--seed", type=int, default=0, help="of the first weights and the order of rows (%(default)s)")
    command.add_argument("--history", type=Path, metavar="FILE", help="write the table of epochs, as CSV")
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="replaced after each epoch (default: beside the output, and removed in the end)",
    )
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    add_device(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and write the model."""
    if options.output.suffix != ".safetensors" or not options.output.parent.is_dir():
        raise ValueError(f"{options.output}: expected a .safetensors file in an existing folder")
    rows = open_matrix(options.data, name=options.name)
    features = rows.shape[1]
    if not 1 <= options.rank <= features:
        raise ValueError(f"--rank: expected 1 ≤ rank ≤ columns of {options.data} = {features}, got {options.rank}")
    with processes.launched():
        module = _fresh(rows, options)
        result = _trained(module, rows, options)
        if processes.rank() == 0:
            _write(result, module, rows, options)


def _fresh(rows: FileMatrix | torch.Tensor, options: argparse.Namespace) -> Bottleneck:
    torch.manual_seed(options.seed)
    return Bottleneck(
        rows.shape[1],
        options.rank,
        bias=not options.no_bias,
        activation=options.activation,
        tied=options.tied,
        device=options.device,
        dtype=RowMatrix.of(rows, str(options.data)).dtype if options.dtype is None else _DTYPES[options.dtype],
    )


def _trained(module: Bottleneck, rows: FileMatrix | torch.Tensor, options: argparse.Namespace) -> PretrainResult:
    checkpoint = options.checkpoint or _own_checkpoint(options)
    try:
        return pretrain(
            module,
            rows,
            method=options.method,
            epochs=options.epochs,
            batch_size=options.batch_size,
            optimizer=functools.partial(torch.optim.Adam, lr=options.lr),
            stop_at=options.stop_at,
            validation=options.validation,
            patience=options.patience,
            seed=options.seed,
            checkpoint=checkpoint,
            resume=options.resume,
        )
    except KeyboardInterrupt:
        if processes.rank() == 0 and checkpoint.exists():
            print(f"\nbyol-fast: checkpoint in {checkpoint}; the same command with --resume goes on", file=sys.stderr)
        raise


def _own_checkpoint(options: argparse.Namespace) -> Path:
    output: Path = options.output
    return output.with_suffix(".checkpoint.pt")


def _write(
    result: PretrainResult, module: Bottleneck, rows: FileMatrix | torch.Tensor, options: argparse.Namespace
) -> None:
    deploy(_in_principal_order(result, module), options.output)
    if options.history is not None:
        _write_history(result, options.history)
    if options.checkpoint is None:
        _own_checkpoint(options).unlink(missing_ok=True)
    seconds = result.history[-1]["seconds"] if result.history else 0.0
    facts = {
        "data": f"{options.data}, {len(rows):,} × {rows.shape[1]:,}, {str(rows.dtype).removeprefix('torch.')}",
        "method": f"{result.method}, on {processes.size()} process{'es' if processes.size() > 1 else ''}",
        "loss": f"{result.loss:.6g}",
    }
    if result.pca is not None:
        curve = result.pca.curve(centered=not options.no_bias)
        facts["yield"] = f"{1 - result.loss / (float(curve.errors[0]) or 1.0):.4%}"
        facts["best possible"] = f"{curve.yield_at(options.rank):.4%} at rank {options.rank} without an activation"
    if not math.isnan(result.certificate):
        facts["certificate"] = f"{result.certificate:.6f} (loss / best possible loss)"
    facts["speed"] = speed(rows, _passes(result), seconds)
    facts["model"] = str(options.output)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _in_principal_order(result: PretrainResult, module: Bottleneck) -> Bottleneck:
    """Rotated so that codes can be cut to any smaller rank, where that changes no function."""
    pca = result.pca
    if module.activation != "identity" or pca is None or pca.explain().method != "covariance":
        return module
    return module.canonicalize(covariance=pca.covariance_, mean=pca.mean_)


def _passes(result: PretrainResult) -> int:
    """How often the rows were read: for the covariance, and by each epoch of steps."""
    steps = sum("lr" in row for row in result.history)
    return max(steps + (result.pca is not None), 1)


def _write_history(result: PretrainResult, path: Path) -> None:
    columns = {name: None for row in result.history for name in row}
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(result.history)
