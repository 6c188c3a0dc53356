"""Read a matrix from a file, without reading it into memory where the format allows."""

from __future__ import annotations

import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

__all__ = ["SUFFIXES", "read_matrix"]


def read_matrix(path: str | os.PathLike[str], *, name: str | None = None) -> Tensor:
    """The rows in a file, as a tensor ``[N, D]``.

    ``.npy``, ``.npz`` (as ``numpy.savez`` writes it), ``.pt`` and ``.safetensors`` files are memory-mapped: rows are
    read when they are used, so the file may be larger than memory. A compressed ``.npz`` is read whole. The columns of
    a ``.parquet`` file, which are numbers or one fixed-size list of numbers, are decoded in a stream into an unnamed
    temporary file (in ``TMPDIR``) and memory-mapped from there. Writing to the tensor never writes to the file.

    Args:
        path: the file; its suffix says what it holds.
        name: which of the arrays in the file; not needed where there is only one with two dimensions. For ``.parquet``,
            which column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, malformed, or holds no such matrix. The message is one line and names
            the file, what was expected and what was found.
        ModuleNotFoundError: ``.parquet`` without pyarrow.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(
            f"{path}: expected a file ending in {', '.join(SUFFIXES)}, found {path.suffix or 'no suffix'!r}"
        )
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"{path}: expected a {path.suffix} file, found {found}")
    try:
        matrix = _READERS[path.suffix](path, name)
    except _Unfit as error:
        raise ValueError(f"{path}: {error}") from None
    except ImportError:
        raise
    except Exception as error:
        found = f"{path.stat().st_size} bytes that are not one"
        raise ValueError(f"{path}: expected a {path.suffix} file, found {found} ({_first_line(error)})") from error
    if matrix.is_complex() or matrix.dtype == torch.bool or matrix.is_quantized:
        raise ValueError(f"{path}: expected real numbers, found {matrix.dtype}")
    if matrix.dim() != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{path}: expected a matrix [N, D] with D ≥ 1, found shape {list(matrix.shape)}")
    return matrix


class _Unfit(Exception):
    """The file is sound but does not hold what was asked for: "expected …, found …"."""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _chosen(arrays: Mapping[str, tuple[int, ...]], name: str | None) -> str:
    """The array with this name, or the only one with two dimensions."""
    listing = ", ".join(f"{key} {list(shape)}" for key, shape in arrays.items()) or "none"
    if name is not None:
        if name not in arrays:
            raise _Unfit(f"expected an array named {name!r}, found {listing}")
        return name
    matrices = [key for key, shape in arrays.items() if len(shape) == 2]
    if len(matrices) != 1:
        raise _Unfit(f"expected one matrix, or the name of one, found {listing}")
    return matrices[0]


def _read_npy(path: Path, name: str | None) -> Tensor:
    if name is not None:
        raise _Unfit(f"expected a file with named arrays for the name {name!r}, found a .npy file")
    # Copy-on-write, because torch warns about memory it must not write.
    return _tensor(np.load(path, mmap_mode="c", allow_pickle=False))


def _read_npz(path: Path, name: str | None) -> Tensor:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        shapes = {}
        for key, info in members.items():
            with archive.open(info) as file:
                shapes[key] = _npy_header(file)[0]
        member = members[_chosen(shapes, name)]
        if member.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as file:
                return _tensor(npy.read_array(file, allow_pickle=False))
    with open(path, "rb") as file:
        # The local header of a zip member: 30 bytes, of which the last four are the lengths of name and extra field.
        file.seek(member.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        begin = file.tell()
        shape, fortran_order, dtype = _npy_header(file)
        start = file.tell()
    announced = start - begin + math.prod(shape) * dtype.itemsize
    if announced != member.file_size:
        raise ValueError(f"{member.filename} has {member.file_size} bytes, its header says {announced}")
    order = "F" if fortran_order else "C"
    return _tensor(np.memmap(path, dtype, "c", start, shape, order))  # type: ignore[call-overload]


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
    return read(file)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.hasobject or array.dtype.kind not in "fiu":
        raise _Unfit(f"expected real numbers, found {array.dtype}")
    if array.dtype.byteorder not in "=|" and not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array) if array.size else torch.from_numpy(np.array(array))


def _read_pt(path: Path, name: str | None) -> Tensor:
    content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    arrays = {"": content} if isinstance(content, Tensor) else content
    if not isinstance(arrays, Mapping):
        raise _Unfit(f"expected a tensor or a dictionary of tensors, found {type(content).__name__}")
    arrays = {key: value for key, value in arrays.items() if isinstance(value, Tensor)}
    if name is None and len(arrays) == 1:
        return cast(Tensor, next(iter(arrays.values())))
    return cast(Tensor, arrays[_chosen({key: tuple(value.shape) for key, value in arrays.items()}, name)])


def _read_safetensors(path: Path, name: str | None) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return cast(Tensor, file.get_tensor(_chosen(shapes, name)))


def _read_parquet(path: Path, name: str | None) -> Tensor:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path}: reading .parquet needs pyarrow: pip install 'byol_fast[parquet]'") from None
    file = parquet.ParquetFile(path)
    schema = file.schema_arrow
    columns = schema.names if name is None else [name]
    if name is not None and name not in schema.names:
        raise _Unfit(f"expected a column named {name!r}, found {', '.join(schema.names)}")
    kinds = [schema.field(column).type for column in columns]
    if len(kinds) == 1 and arrow.types.is_fixed_size_list(kinds[0]):
        width, kinds = kinds[0].list_size, [kinds[0].value_type]
    else:
        width = len(columns)
    for column, kind in zip(columns, kinds, strict=False):
        if not (arrow.types.is_floating(kind) or arrow.types.is_integer(kind)):
            raise _Unfit(f"expected columns of numbers, or one fixed-size list of numbers, found {kind} in {column!r}")
    dtype = np.result_type(*(kind.to_pandas_dtype() for kind in kinds))
    rows = file.metadata.num_rows
    if rows == 0 or width == 0:
        return torch.from_numpy(np.empty((rows, width), dtype))
    with tempfile.TemporaryFile() as storage:
        matrix = np.memmap(storage, dtype, "w+", shape=(rows, width))
        start = 0
        for batch in file.iter_batches(columns=columns):
            if any(column.null_count for column in batch.columns):
                raise _Unfit(
                    f"expected a number in every field, found none in rows {start} to {start + len(batch) - 1}"
                )
            values = [column.flatten() if len(columns) == 1 else column for column in batch.columns]
            # One fixed-size list is a single run of numbers; columns are side by side.
            arrays = [value.to_numpy(zero_copy_only=False) for value in values]
            stop = start + len(batch)
            matrix[start:stop] = arrays[0].reshape(-1, width) if len(arrays) == 1 else np.stack(arrays, axis=1)
            start = stop
    return torch.from_numpy(matrix)


_READERS: dict[str, Callable[[Path, str | None], Tensor]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
