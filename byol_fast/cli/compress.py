"""``compress``: a saved model made smaller, and faster where that is measured."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compression import CompressionReport, Recovery, compress
from ..compression.exported import with_layers
from ..data import read_matrix
from ..phases import deploy
from .arguments import Commands

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "compress", help="a saved model (torch.export, or a transformers folder) with bottlenecks where they pay"
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="a .pt2 file, or a folder of transformers")
    command.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="FILE",
        help="for a folder: texts, one a line; for a .pt2 file: rows, a matrix in .npy, .npz, .pt, .safetensors or "
        ".parquet, given the shape that the model takes",
    )
    command.add_argument("--name", help="which array or column of that file (default: its only matrix)")
    command.add_argument(
        "-o", "--output", type=Path, required=True, help="file or folder to write; a report goes beside or into it"
    )
    goals = command.add_mutually_exclusive_group()
    goals.add_argument("--keep", type=float, metavar="SHARE", help="share of the weights that may be left (0.5)")
    goals.add_argument("--error", type=float, metavar="ERROR", help="the largest relative error of the output")
    goals.add_argument("--latency", type=float, metavar="MS", help="milliseconds that a batch may take")
    command.add_argument("--gate", choices=("latency", "none"), default="latency", help="(%(default)s)")
    command.add_argument("--include", action="append", metavar="NAME", help="only modules of this name (repeatable)")
    command.add_argument("--exclude", action="append", metavar="NAME", help="no modules of this name (repeatable)")
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows of a batch (%(default)s)")
    command.add_argument("--samples", type=int, default=256, metavar="N", help="how many are used (%(default)s)")
    command.add_argument("--recover", type=int, default=0, metavar="EPOCHS", help="distil for so many epochs (none)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Compress, write, and print the report."""
    if options.samples < 2 or options.batch_size < 2:
        raise ValueError(f"--samples, --batch-size: expected ≥ 2, got {options.samples}, {options.batch_size}")
    if options.model.is_dir():
        report = _folder(options)
    else:
        report = _program(options)
    print(report)


def _compressed(
    options: argparse.Namespace, model: torch.nn.Module, batches: Iterable[Any]
) -> tuple[torch.nn.Module, CompressionReport]:
    return compress(
        model,
        batches,
        keep=options.keep,
        error=options.error,
        latency=options.latency,
        gate=options.gate,
        include=options.include,
        exclude=options.exclude,
        recovery=Recovery(epochs=options.recover) if options.recover else None,
    )


def _program(options: argparse.Namespace) -> CompressionReport:
    try:
        program = torch.export.load(options.model)
    except Exception as error:
        raise ValueError(
            f"{options.model}: expected a file of torch.export or a folder, found another ({error})"
        ) from error
    shape = next(
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    )
    rows = _rows(options).reshape(-1, *(int(size) for size in shape[1:]))
    batches = [batch for batch in rows.split(options.batch_size) if len(batch) > 1]
    model, report = _compressed(options, with_layers(program), batches)
    deploy(model, options.output, format="torch_export", example=batches[0])
    report.to_json(options.output.with_name(f"{options.output.name}.report.json"))
    return report


def _rows(options: argparse.Namespace) -> Tensor:
    return read_matrix(options.calibration, name=options.name)[: options.samples].float()


def _folder(options: argparse.Namespace) -> CompressionReport:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "compress: a folder of transformers needs transformers: pip install 'byol_fast[transformers]'"
        ) from None
    lines = options.calibration.read_text(encoding="utf-8").splitlines()
    # Of about one length together, the longest first, for that is the batch the gate times.
    texts = sorted((line for line in lines if line.strip()), key=len, reverse=True)[: options.samples]
    if len(texts) < 2:
        raise ValueError(f"{options.calibration}: expected two or more lines of text, found {len(texts)}")
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    model = AutoModel.from_pretrained(options.model, local_files_only=True).eval()
    batches = [
        dict(tokenizer(texts[i : i + options.batch_size], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, len(texts), options.batch_size)
    ]
    compressed, report = _compressed(options, model, batches)
    options.output.mkdir(parents=True, exist_ok=True)
    for file in options.model.iterdir():
        # Configuration and tokeniser, for the architecture is made of these.
        if file.suffix in (".json", ".txt") and "index" not in file.name:
            shutil.copy(file, options.output / file.name)
    deploy(compressed, options.output / "compressed.safetensors", format="state")
    report.to_json(options.output / "report.json")
    return report
