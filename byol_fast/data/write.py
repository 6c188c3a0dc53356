"""Write a matrix to a file block by block, so that it may be larger than memory."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ..files import replacing
from .filematrix import FileMatrix, bytes_of
from .read import SUFFIXES, arrow_of

__all__ = ["write_matrix"]

# The name of the matrix where the format wants one.
_NAME = "rows"
_SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_matrix(
    path: str | os.PathLike[str], blocks: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Write the rows of ``blocks``, one block after the other, to a file that is replaced in one step at the end.

    Args:
        path: the file; its suffix says the format, one of those :func:`read_matrix` reads. Named ``rows`` where the
            format wants a name; one fixed-size list in ``.parquet``.
        blocks: tensors ``[n, D]`` that have N rows together.
        shape: ``[N, D]``.
        dtype: of the numbers in the file, floating-point. ``.npy``, ``.npz`` and ``.parquet`` have no bfloat16.

    Raises:
        ValueError: the file has another suffix or cannot hold this dtype, or the blocks have other rows.
        ModuleNotFoundError: ``.parquet`` without pyarrow.
    """
    path = Path(path)
    check_writable(path, dtype)
    with replacing(path) as temporary:
        _WRITERS[path.suffix](temporary, _checked(blocks, shape, dtype), shape, dtype)


def check_writable(path: Path, dtype: torch.dtype) -> None:
    """Raise now what :func:`write_matrix` would raise about the file."""
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected an existing folder, found no {path.parent}")
    if dtype not in _SAFETENSORS or (dtype == torch.bfloat16 and path.suffix not in (".pt", ".safetensors")):
        raise ValueError(f"{path}: expected a dtype that {path.suffix} can hold, got {dtype}")
    if path.suffix == ".parquet":
        arrow_of(path, "writing")


def _checked(blocks: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Iterable[Tensor]:
    rows = 0
    for block in blocks:
        if block.dim() != 2 or block.shape[1] != shape[1]:
            raise ValueError(f"blocks: expected shape [any, {shape[1]}], got {list(block.shape)}")
        rows += len(block)
        yield block.detach().to("cpu", dtype).contiguous()
    if rows != shape[0]:
        raise ValueError(f"blocks: expected {shape[0]} rows together, got {rows}")


def _append(file: BinaryIO, blocks: Iterable[Tensor]) -> None:
    for block in blocks:
        file.write(bytes_of(block))


def _npy_header(file: BinaryIO, shape: tuple[int, int], dtype: torch.dtype) -> None:
    descr = npy.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def _write_npy(path: Path, blocks: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    with open(path, "wb") as file:
        _npy_header(file, shape, dtype)
        _append(file, blocks)


def _write_npz(path: Path, blocks: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    with zipfile.ZipFile(path, "w") as archive, archive.open(f"{_NAME}.npy", "w", force_zip64=True) as file:
        _npy_header(file, shape, dtype)  # type: ignore[arg-type]
        _append(file, blocks)  # type: ignore[arg-type]


def _write_pt(path: Path, blocks: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    # torch writes a tensor that is there, so it gets one that lies in a file, too.
    with tempfile.TemporaryFile() as storage:
        _append(storage, blocks)
        storage.flush()
        torch.save(FileMatrix(storage, shape, dtype, 0).tensor(), path)


def _write_safetensors(path: Path, blocks: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    size = shape[0] * shape[1] * dtype.itemsize
    entry = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({_NAME: entry}).encode()
    # The format begins its numbers at a multiple of 8.
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        _append(file, blocks)


def _write_parquet(path: Path, blocks: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    arrow, parquet = arrow_of(path, "writing")
    kind = arrow.list_(arrow.from_numpy_dtype(torch.empty(0, dtype=dtype).numpy().dtype), shape[1])
    schema = arrow.schema([(_NAME, kind)])
    with parquet.ParquetWriter(path, schema) as writer:
        for block in blocks:
            numbers = arrow.array(np.ravel(block.numpy()))
            writer.write_table(arrow.table([arrow.FixedSizeListArray.from_arrays(numbers, shape[1])], schema=schema))


_WRITERS: dict[str, Callable[[Path, Iterable[Tensor], tuple[int, int], torch.dtype], None]] = {
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".pt": _write_pt,
    ".safetensors": _write_safetensors,
    ".parquet": _write_parquet,
}
