"""``curve``: what every rank keeps of the data."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from ..curve import YieldCurve
from ..data import open_matrix
from ..pca import StreamingPCA
from .arguments import Commands, add_data, add_device, ranks
from .stream import Stream

__all__ = ["add", "run"]

_FIGURE = Path("curve.png")
_MARKS = (0.5, 0.9, 0.95, 0.99, 0.999)


def add(commands: Commands) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "curve", help="yield and error of the best bottleneck of every rank: a table and a figure, from one pass"
    )
    add_data(command)
    command.add_argument(
        "--rank",
        type=int,
        metavar="K",
        help="the curve up to this rank (default: all ranks); saves time where a row has thousands of features",
    )
    command.add_argument(
        "--ranks", type=ranks, metavar="K,K,…", help="the ranks of the table (default: powers of 2 and round yields)"
    )
    command.add_argument("--figure", type=Path, metavar="FILE", help=f"where the figure goes ({_FIGURE})")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write every rank to this file, too")
    command.add_argument("--no-bias", action="store_true", help="of bottlenecks without biases")
    add_device(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the table; write the figure."""
    stream = Stream(open_matrix(options.data, name=options.name), "curve")
    pca = StreamingPCA(stream.matrix.shape[1], rank=options.rank, device=options.device)
    _read(pca, stream, options.data)
    if pca.explain().method == "randomized":
        pca = pca.next_pass()
        _read(pca, stream, options.data)
    curve = pca.curve(centered=not options.no_bias)
    print(_table(curve, options.ranks or _round_ranks(curve)))
    print(f"\n{curve!r}\n{pca.explain()}\n{stream.speed()}")
    if options.csv is not None:
        curve.to_csv(options.csv)
        print(f"every rank: {options.csv}")
    if options.figure is None and importlib.util.find_spec("matplotlib") is None:
        print("no figure: it needs matplotlib: pip install 'byol_fast[plot]'")
        return
    figure = options.figure or _FIGURE
    curve.plot(figure)
    print(f"figure: {figure}")


def _read(pca: StreamingPCA, stream: Stream, path: Path) -> None:
    if len(stream.matrix) == 0:
        raise ValueError(f"{path}: expected at least one row, found shape {list(stream.matrix.shape)}")
    for block in stream:
        pca.partial_fit(block)


def _round_ranks(curve: YieldCurve) -> list[int]:
    powers = {1 << exponent for exponent in range(curve.max_rank.bit_length())}
    marks = {curve.rank_for(energy=share) for share in _MARKS if curve.yields[-1] >= share}
    return sorted(powers | marks | {curve.max_rank})


def _table(curve: YieldCurve, ranks: list[int]) -> str:
    lines = [f"{'rank':>6} {'yield':>10} {'error':>13} {'ratio':>9} {'bytes':>9}"]
    lines += [
        f"{rank:>6} {curve.yield_at(rank):>10.4%} {curve.error_at(rank):>13.6g} {curve.ratio_at(rank):>9.2f}"
        f" {4 * rank:>9,}"
        for rank in ranks
    ]
    return "\n".join(lines)
