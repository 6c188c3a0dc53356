"""read_matrix: every format gives the same rows, memory-mapped where it can be; what does not fit is named."""

import importlib.util
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import byol_fast as bf
from byol_fast.data import SUFFIXES, FileMatrix, open_matrix, read_matrix, write_matrix

ROWS = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
needs_pyarrow = pytest.mark.skipif(not HAS_PYARROW, reason="reading .parquet needs pyarrow")


def write_npy(path):
    np.save(path, ROWS)


def write_fortran_npy(path):
    np.save(path, np.asfortranarray(ROWS))


def write_big_endian_npy(path):
    np.save(path, ROWS.astype(">f4"))


def write_npz(path):
    np.savez(path, rows=ROWS, labels=np.arange(50))


def write_fortran_npz(path):
    np.savez(path, rows=np.asfortranarray(ROWS))


def write_compressed_npz(path):
    np.savez_compressed(path, rows=ROWS)


def write_pt(path):
    torch.save(torch.from_numpy(ROWS), path)


def write_pt_dictionary(path):
    torch.save({"rows": torch.from_numpy(ROWS), "labels": torch.arange(50), "note": "real"}, path)


def write_safetensors(path):
    save_file({"rows": torch.from_numpy(ROWS), "labels": torch.arange(50)}, path)


def write_parquet_columns(path):
    import pyarrow as arrow
    from pyarrow import parquet

    columns = {f"x{index}": ROWS[:, index] for index in range(7)}
    parquet.write_table(arrow.table(columns), path, row_group_size=8)


def write_parquet_lists(path):
    import pyarrow as arrow
    from pyarrow import parquet

    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(ROWS.ravel()), 7)
    parquet.write_table(arrow.table({"rows": lists}), path, row_group_size=8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        (write_npy, ".npy"),
        (write_fortran_npy, ".npy"),
        (write_big_endian_npy, ".npy"),
        (write_npz, ".npz"),
        (write_fortran_npz, ".npz"),
        (write_compressed_npz, ".npz"),
        (write_pt, ".pt"),
        (write_pt_dictionary, ".pt"),
        (write_safetensors, ".safetensors"),
        pytest.param(write_parquet_columns, ".parquet", marks=needs_pyarrow),
        pytest.param(write_parquet_lists, ".parquet", marks=needs_pyarrow),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, write, suffix):
    path = tmp_path / f"rows{suffix}"
    write(path)
    before = path.read_bytes()
    rows = read_matrix(path)
    assert rows.dtype == torch.float32
    assert np.array_equal(rows.numpy(), ROWS)
    rows.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("write", "suffix"), [(write_npz, ".npz"), (write_pt_dictionary, ".pt"), (write_safetensors, ".safetensors")]
)
def test_a_name_chooses_among_arrays(tmp_path, write, suffix):
    path = tmp_path / f"rows{suffix}"
    write(path)
    assert np.array_equal(read_matrix(path, name="rows").numpy(), ROWS)
    with pytest.raises(ValueError, match=r"expected an array named 'images', found .*rows \[50, 7\]"):
        read_matrix(path, name="images")
    with pytest.raises(ValueError, match=r"expected a matrix \[N, D\] with D ≥ 1, found shape \[50\]"):
        read_matrix(path, name="labels")


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc")
@pytest.mark.parametrize(
    ("write", "suffix"),
    [(write_npy, ".npy"), (write_npz, ".npz"), (write_pt, ".pt"), (write_safetensors, ".safetensors")],
)
def test_the_file_is_mapped_and_not_read(tmp_path, write, suffix):
    path = tmp_path / f"rows{suffix}"
    write(path)
    rows = read_matrix(path)
    with open("/proc/self/maps") as maps:
        mapped = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps if str(path) in line]
    assert any(start <= rows.data_ptr() < stop for start, stop in mapped)


@needs_pyarrow
def test_parquet_columns_by_name_and_what_does_not_fit(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(ROWS.ravel()), 7)
    text, holes = ["a"] * 50, [None] + [1.0] * 49
    parquet.write_table(arrow.table({"rows": lists, "text": text, "holes": holes}), path)
    assert np.array_equal(read_matrix(path, name="rows").numpy(), ROWS)
    for name, message in [
        (None, "expected columns of numbers, or one fixed-size list of numbers, found fixed_size_list"),
        ("text", "expected columns of numbers, or one fixed-size list of numbers, found string in 'text'"),
        ("holes", "expected a number in every field, found none in rows 0 to 49"),
        ("images", "expected a column named 'images', found rows, text, holes"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_matrix(path, name=name)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"rows.parquet: reading .* pip install 'byol_fast\[parquet\]'"):
        read_matrix(path)


def test_a_matrix_from_a_file_is_pretrained(tmp_path):
    path = tmp_path / "rows.npy"
    write_npy(path)
    layer = bf.Bottleneck(7, 7)
    bf.pretrain(layer, read_matrix(path))
    assert float(layer.reconstruction_loss(torch.from_numpy(ROWS)).detach()) < 1e-12


# ------------------------------------------------------------------------------------------------------ errors


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def text(path):
    path.write_text("not what it says")


def empty(path):
    path.write_bytes(b"")


WRITERS = {".npy": write_npy, ".npz": write_npz, ".pt": write_pt, ".safetensors": write_safetensors}


@pytest.mark.parametrize("damage", [cut, text, empty])
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    damage(path)
    with pytest.raises(ValueError) as caught:
        read_matrix(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected a {suffix} file, found {path.stat().st_size} bytes that are not one (")
    assert "\n" not in message


def test_a_pickle_is_not_run(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"expected real numbers, found object"):
        read_matrix(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 3, 4)), r"expected a matrix \[N, D\] with D ≥ 1, found shape \[2, 3, 4\]"),
        (np.zeros(3), r"found shape \[3\]"),
        (np.zeros((3, 0)), r"found shape \[3, 0\]"),
        (np.zeros((2, 2), complex), "expected real numbers, found complex128"),
        (np.zeros((2, 2), bool), "expected real numbers, found bool"),
        (np.array([["a"]]), "expected real numbers, found <U1"),
    ],
)
def test_what_is_no_matrix_is_named(tmp_path, content, message):
    path = tmp_path / "rows.npy"
    np.save(path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_matrix(path)
    assert str(caught.value).startswith(str(path))


def test_two_matrices_need_a_name(tmp_path):
    path = tmp_path / "rows.npz"
    np.savez(path, train=ROWS, test=ROWS)
    with pytest.raises(
        ValueError, match=r"expected one matrix, or the name of one, found train \[50, 7\], test \[50, 7\]"
    ):
        read_matrix(path)


def test_a_list_of_tensors_is_no_matrix(tmp_path):
    torch.save([torch.zeros(2, 2)], tmp_path / "rows.pt")
    with pytest.raises(ValueError, match="expected a tensor or a dictionary of tensors, found list"):
        read_matrix(tmp_path / "rows.pt")


def test_a_missing_file_a_folder_and_another_suffix_are_named(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none.npy: expected a .npy file, found nothing"):
        read_matrix(tmp_path / "none.npy")
    with pytest.raises(FileNotFoundError, match=r"folder.npy: expected a .npy file, found a folder"):
        read_matrix(tmp_path / "folder.npy")
    with pytest.raises(ValueError, match=r"rows.csv: expected a file ending in .npy, .npz, .pt, .*, found '.csv'"):
        read_matrix(tmp_path / "rows.csv")


def test_an_npz_whose_header_lies_is_named(tmp_path):
    path = tmp_path / "rows.npz"
    # Large enough that its checksum is not checked in passing.
    np.savez(path, rows=np.zeros((50000, 7)))
    content = path.read_bytes()
    assert content.count(b"(50000, 7)") == 1
    path.write_bytes(content.replace(b"(50000, 7)", b"(99999, 7)"))
    with pytest.raises(
        ValueError, match=r"rows.npz: expected .* \(rows.npy has 2800128 bytes, its header says 5600072\)"
    ):
        read_matrix(path)


# ------------------------------------------------------------------------------------- read in blocks, and written


def sparse_npy(path, rows):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, 1024)})
        file.truncate(file.tell() + rows * 4096)


def sparse_safetensors(path, rows):
    entry = {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}
    header = json.dumps({"rows": entry}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + rows * 4096)


@pytest.mark.skipif(sys.platform != "linux", reason="how much memory there is is read from /proc")
@pytest.mark.parametrize(("write", "suffix"), [(sparse_npy, ".npy"), (sparse_safetensors, ".safetensors")])
def test_a_file_larger_than_memory_is_mapped(tmp_path, write, suffix):
    """Its zeros take no room on the disk."""
    memory = Path("/proc/meminfo").read_text()
    kibibytes = dict(re.findall(r"(MemTotal|SwapTotal): +(\d+) kB", memory))
    rows = 2 * sum(map(int, kibibytes.values())) // 4
    path = tmp_path / f"rows{suffix}"
    write(path, rows)
    matrix = read_matrix(path)
    assert matrix.shape == (rows, 1024)
    matrix[-1, -1] = 5
    assert float(matrix[-1].sum()) == 5
    assert float(open_matrix(path)[rows - 1 :].sum()) == 0


@pytest.mark.parametrize(
    ("write", "suffix"),
    [(write_npy, ".npy"), (write_npz, ".npz"), (write_pt_dictionary, ".pt"), (write_safetensors, ".safetensors")],
)
def test_rows_are_read_in_blocks_and_gathered_by_index(tmp_path, write, suffix):
    path = tmp_path / f"rows{suffix}"
    write(path)
    matrix = open_matrix(path, name=None if suffix == ".npy" else "rows")
    assert isinstance(matrix, FileMatrix)
    rows = torch.from_numpy(ROWS)
    assert (matrix.shape, matrix.dtype, len(matrix)) == (rows.shape, rows.dtype, 50)
    for part in (slice(0, 20), slice(45, 99), slice(7, 7), slice(None, None, 3), torch.tensor([4, 0, 49])):
        assert torch.equal(matrix[part], rows[part])
    block = matrix[:5]
    block.zero_()
    assert torch.equal(matrix.tensor(), rows)
    pca = bf.StreamingPCA(7).partial_fit(matrix)
    assert torch.equal(pca.covariance_, bf.StreamingPCA(7).partial_fit(rows).covariance_)
    for method in ("exact", "covariance", "randomized"):
        found, truth = (bf.truncated_svd(m, 3, method=method).S for m in (matrix, rows))
        assert torch.equal(found, truth)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path):
    path = tmp_path / "rows.npy"
    write_npy(path)
    matrix = open_matrix(path)
    cut(path)
    with pytest.raises(OSError, match=r"rows\.npy: expected 50 rows, but the file has become shorter"):
        matrix[:50]


def test_views_and_transposes_in_a_pt_file_are_read_as_they_are(tmp_path):
    rows = torch.from_numpy(ROWS)
    for name, part in {"rows": rows[3:9], "columns": rows[:, 2:5], "transposed": rows.T, "row": rows[4:5]}.items():
        torch.save({"x": part, "all": rows}, tmp_path / f"{name}.pt")
        assert torch.equal(read_matrix(tmp_path / f"{name}.pt", name="x"), part)
    torch.save(rows, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_matrix(tmp_path / "old.pt"), rows)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read(tmp_path, suffix, dtype):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path, rows = tmp_path / f"rows{suffix}", torch.from_numpy(ROWS)
    blocks = (rows[:20].T.contiguous().T, rows[20:20], rows[20:])
    if dtype == torch.bfloat16 and suffix not in (".pt", ".safetensors"):
        with pytest.raises(ValueError, match=f"expected a dtype that {suffix} can hold, got torch.bfloat16"):
            write_matrix(path, blocks, (50, 7), dtype)
        return
    write_matrix(path, blocks, (50, 7), dtype)
    assert read_matrix(path).dtype == dtype
    assert torch.equal(read_matrix(path), rows.to(dtype))
    write_matrix(path, [], (0, 7), dtype)
    assert read_matrix(path).shape == (0, 7)


def test_others_read_what_is_written(tmp_path):
    from safetensors.torch import load_file

    rows = torch.from_numpy(ROWS)
    for suffix in (".npy", ".npz", ".pt", ".safetensors"):
        write_matrix(tmp_path / f"rows{suffix}", rows.split(9), (50, 7), torch.float32)
    assert (np.load(tmp_path / "rows.npy") == ROWS).all()
    assert (np.load(tmp_path / "rows.npz")["rows"] == ROWS).all()
    assert torch.equal(torch.load(tmp_path / "rows.pt"), rows)
    assert torch.equal(load_file(tmp_path / "rows.safetensors")["rows"], rows)


@pytest.mark.parametrize("shape", [(49, 7), (50, 6)])
def test_a_failed_write_keeps_the_old_file(tmp_path, shape):
    path = tmp_path / "rows.npy"
    write_npy(path)
    with pytest.raises(ValueError, match=r"blocks: expected .*, got"):
        write_matrix(path, torch.from_numpy(ROWS).split(9), shape, torch.float32)
    assert (np.load(path) == ROWS).all()
    assert list(tmp_path.iterdir()) == [path]
