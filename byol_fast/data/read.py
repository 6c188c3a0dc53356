"""Read a matrix from a file, without reading it into memory where the format allows."""

from __future__ import annotations

import json
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
from torch._subclasses.fake_tensor import FakeTensorMode

from .filematrix import FileMatrix, bytes_of, mapped

__all__ = ["SUFFIXES", "open_matrix", "read_matrix"]

_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}
_REAL = set(_SAFETENSORS.values())


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
    matrix = open_matrix(path, name=name)
    return matrix.tensor() if isinstance(matrix, FileMatrix) else matrix


def open_matrix(path: str | os.PathLike[str], *, name: str | None = None) -> FileMatrix | Tensor:
    """The rows in a file, for one who goes through them from the first to the last.

    As :func:`read_matrix`, but read in blocks instead of memory-mapped where the rows lie one after the other: the
    memory of the process then stays the same however large the file is.
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
    if matrix.dtype not in _REAL:
        raise ValueError(f"{path}: expected real numbers, found {matrix.dtype}")
    if len(matrix.shape) != 2 or matrix.shape[1] == 0:
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


def _read_npy(path: Path, name: str | None) -> FileMatrix | Tensor:
    if name is not None:
        raise _Unfit(f"expected a file with named arrays for the name {name!r}, found a .npy file")
    with open(path, "rb") as file:
        return _npy_at(file, 0)


def _npy_at(file: Any, begin: int, size: int | None = None) -> FileMatrix | Tensor:
    """The array whose ``.npy`` header begins there, of ``size`` bytes together."""
    file.seek(begin)
    shape, fortran_order, dtype = _npy_header(file)
    offset = file.tell()
    announced = offset - begin + math.prod(shape) * dtype.itemsize
    if size is not None and size != announced:
        raise ValueError(f"{size} bytes, its header says {announced}")
    kind = _torch_dtype(dtype)
    if not dtype.isnative:
        if os.fstat(file.fileno()).st_size < begin + announced:
            raise ValueError(f"expected {announced} bytes, found fewer")
        array = np.frombuffer(mapped(file.fileno()), dtype, math.prod(shape), offset)
        array = array.reshape(shape, order="F" if fortran_order else "C")
        return torch.from_numpy(array.astype(dtype.newbyteorder("=")))
    if fortran_order:
        return FileMatrix(file, shape[::-1], kind, offset).tensor().permute(*range(len(shape) - 1, -1, -1))
    return FileMatrix(file, shape, kind, offset)


def _read_npz(path: Path, name: str | None) -> FileMatrix | Tensor:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        shapes = {}
        for key, info in members.items():
            with archive.open(info) as stream:
                shapes[key] = _npy_header(stream)[0]
        member = members[_chosen(shapes, name)]
        if member.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as stream:
                array = npy.read_array(stream, allow_pickle=False)
                _torch_dtype(array.dtype)
                return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    with open(path, "rb") as file:
        # The local header of a zip member: 30 bytes, of which the last four are the lengths of name and extra field.
        file.seek(member.header_offset + 26)
        lengths = struct.unpack("<HH", file.read(4))
        try:
            return _npy_at(file, member.header_offset + 30 + sum(lengths), member.file_size)
        except ValueError as error:
            raise ValueError(f"{member.filename} has {error}") from None


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
    return read(file)


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    if dtype.hasobject or dtype.kind not in "fiu":
        raise _Unfit(f"expected real numbers, found {dtype}")
    return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype


def _read_pt(path: Path, name: str | None) -> FileMatrix | Tensor:
    # Fake tensors know where in the file their numbers are, and read none of them.
    with FakeTensorMode():
        content = torch.load(path, weights_only=True, map_location="cpu")
    arrays = {"": content} if isinstance(content, Tensor) else content
    if not isinstance(arrays, Mapping):
        raise _Unfit(f"expected a tensor or a dictionary of tensors, found {type(content).__name__}")
    arrays = {key: value for key, value in arrays.items() if isinstance(value, Tensor)}
    if name is None and len(arrays) == 1:
        key = next(iter(arrays))
    else:
        key = _chosen({key: tuple(value.shape) for key, value in arrays.items()}, name)
    found = arrays[key]
    if found.layout != torch.strided or found.is_quantized or found.dtype not in _REAL:
        raise _Unfit(f"expected real numbers, found {found.dtype} in layout {found.layout}")
    offset = getattr(found.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or found.is_conj() or found.is_neg():
        # Files of before torch 1.6 are read whole.
        loaded = torch.load(path, weights_only=True, map_location="cpu")
        return cast(Tensor, loaded if isinstance(loaded, Tensor) else loaded[key])
    begin = offset + found.storage_offset() * found.dtype.itemsize
    with open(path, "rb") as file:
        if found.is_contiguous():
            return FileMatrix(file, tuple(found.shape), found.dtype, begin)
        numbers = sum((size - 1) * stride for size, stride in zip(found.shape, found.stride(), strict=True)) + 1
        flat = FileMatrix(file, (numbers if found.numel() else 0,), found.dtype, begin).tensor()
        return flat.as_strided(found.shape, found.stride())


def _read_safetensors(path: Path, name: str | None) -> FileMatrix:
    from safetensors import safe_open

    # This framework maps the file without reserving memory for it.
    with safe_open(path, "numpy") as contents:
        slices = {key: contents.get_slice(key) for key in contents.keys()}  # noqa: SIM118
        key = _chosen({key: tuple(part.get_shape()) for key, part in slices.items()}, name)
        shape, kind = tuple(slices[key].get_shape()), slices[key].get_dtype()
    if kind not in _SAFETENSORS:
        raise _Unfit(f"expected real numbers, found {kind}")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(length))[key]["data_offsets"]
        return FileMatrix(file, shape, _SAFETENSORS[kind], 8 + length + begin)


def arrow_of(path: Path, purpose: str) -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``, or the error that says how to get them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: {purpose} .parquet needs pyarrow: pip install 'byol_fast[parquet]'"
        ) from None
    return pyarrow, parquet


def _read_parquet(path: Path, name: str | None) -> FileMatrix | Tensor:
    arrow, parquet = arrow_of(path, "reading")
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
    with tempfile.TemporaryFile() as storage:
        rows = 0
        for batch in file.iter_batches(columns=columns):
            if any(column.null_count for column in batch.columns):
                last = rows + len(batch) - 1
                raise _Unfit(f"expected a number in every field, found none in rows {rows} to {last}")
            values = [column.flatten() if len(columns) == 1 else column for column in batch.columns]
            # One fixed-size list is a single run of numbers; columns are side by side.
            arrays = [value.to_numpy(zero_copy_only=False) for value in values]
            block: Any = arrays[0].reshape(-1, width) if len(arrays) == 1 else np.stack(arrays, axis=1)
            storage.write(bytes_of(torch.from_numpy(np.array(block, dtype))))
            rows += len(batch)
        storage.flush()
        return FileMatrix(storage, (rows, width), _torch_dtype(dtype), 0)


_READERS: dict[str, Callable[[Path, str | None], FileMatrix | Tensor]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
