"""Data of any usual kind as batches whose order depends on the seed and the epoch alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..data import FileMatrix
from ..rows import csr_of, csr_rows_at
from . import processes

__all__ = ["Batch", "Batches", "Data", "batches_of", "training_and_validation"]

Array: TypeAlias = "Tensor | np.ndarray[Any, Any] | FileMatrix"
_ARRAYS = (Tensor, np.ndarray, FileMatrix)
Data: TypeAlias = "Array | Sequence[Array] | Dataset[Any] | DataLoader[Any] | Iterable[Any]"
# Rows a batch holds when data is read only to be measured.
_READ_ROWS = 4096


class Batch(NamedTuple):
    """Tensors with the same number of rows.

    ``rows`` is how many of them count. It is 0 for the stand-in that a process gets whose share of a batch is empty; it
    works through it without weight, so that processes stay in step.
    """

    tensors: tuple[Tensor, ...]
    rows: int


class Batches(ABC):
    """Batches of rows; with several processes, this one's share."""

    @abstractmethod
    def epoch(self, seed: int, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, in an order that ``(seed, number)`` determines, from batch ``start`` on."""

    @abstractmethod
    def in_order(self) -> Iterator[Batch]:
        """Every row once, unshuffled where the data is ours to shuffle."""

    @abstractmethod
    def width(self) -> int:
        """How many tensors a batch has."""

    @abstractmethod
    def steps(self) -> int | None:
        """Batches per epoch, where known beforehand."""

    def identity(self) -> dict[str, int | None]:
        """What has to be the same when a run is resumed."""
        return {"steps": self.steps()}

    def split(self, share: float, seed: int) -> tuple[Batches, Batches]:
        """Two disjoint parts, the second with the given share of the rows."""
        raise TypeError("validation: expected data, because a share cannot be taken from a DataLoader; got a number")


class _Rows(Batches):
    """Rows found by their index."""

    def __init__(self, indices: Tensor, batch_size: int | None) -> None:
        self.indices = indices
        self.batch_size = batch_size

    @abstractmethod
    def take(self, indices: Tensor) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def part(self, indices: Tensor) -> _Rows: ...

    def epoch(self, seed: int, number: int, start: int = 0) -> Iterator[Batch]:
        rows = len(self.indices)
        size = rows if self.batch_size is None else self.batch_size
        order = self.indices
        # One batch has all rows, whatever their order.
        if size < rows:
            generator = torch.Generator().manual_seed(_mixed(seed, number))
            order = self.indices[torch.randperm(rows, generator=generator)]
        return map(self._share, order.split(size)[start:])

    def in_order(self) -> Iterator[Batch]:
        return map(self._share, self.indices.split(_READ_ROWS))

    def _share(self, indices: Tensor) -> Batch:
        mine = indices.tensor_split(processes.size())[processes.rank()]
        return Batch(self.take(mine if len(mine) else indices[:1]), len(mine))

    def steps(self) -> int:
        return 1 if self.batch_size is None else -(-len(self.indices) // self.batch_size)

    def identity(self) -> dict[str, int | None]:
        return {"rows": len(self.indices), "batch_size": self.batch_size}

    def split(self, share: float, seed: int) -> tuple[Batches, Batches]:
        rows = len(self.indices)
        held_out = round(share * rows)
        if not 0 < held_out < rows:
            raise ValueError(f"validation: expected a share that leaves rows on both sides, got {share} of {rows} rows")
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        # Sorted, so that reading in order reads a file in order.
        parts = (self.indices[order[held_out:].sort().values], self.indices[order[:held_out].sort().values])
        return self.part(parts[0]), self.part(parts[1])


class _Arrays(_Rows):
    """Tensors, sparse ones and numpy arrays, memory-mapped ones too, that share their first dimension."""

    def __init__(self, arrays: tuple[Array, ...], indices: Tensor, batch_size: int | None) -> None:
        super().__init__(indices, batch_size)
        self.arrays = arrays

    def take(self, indices: Tensor) -> tuple[Tensor, ...]:
        neighbours = bool((indices.diff() == 1).all())
        chosen = slice(int(indices[0]), int(indices[-1]) + 1) if neighbours else indices
        return tuple(_taken(array, chosen) for array in self.arrays)

    def part(self, indices: Tensor) -> _Rows:
        return _Arrays(self.arrays, indices, self.batch_size)

    def width(self) -> int:
        return len(self.arrays)


class _Items(_Rows):
    """A map-style dataset, collated as a DataLoader does."""

    def __init__(self, dataset: Dataset[Any], indices: Tensor, batch_size: int | None) -> None:
        super().__init__(indices, batch_size)
        self.dataset = dataset

    def take(self, indices: Tensor) -> tuple[Tensor, ...]:
        return _tensors(default_collate([self.dataset[index] for index in indices.tolist()]))

    def part(self, indices: Tensor) -> _Rows:
        return _Items(self.dataset, indices, self.batch_size)

    def width(self) -> int:
        return len(self.take(self.indices[:1]))


class _Loader(Batches):
    """A DataLoader, or any collection of batches that can be gone through again; it decides on sizes and order."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def epoch(self, seed: int, number: int, start: int = 0) -> Iterator[Batch]:
        # What the loader draws from torch's generators is the same for an epoch that is resumed in its middle.
        sampler = getattr(self.loader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(_mixed(seed, number))
            generator = getattr(self.loader, "generator", None) or getattr(sampler, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(_mixed(seed, number))
            batches = iter(self.loader)
            # Samplers draw when they are first asked.
            first = list(islice(batches, 1))
            skipped = sum(1 for _ in islice(chain(first, batches), start))
        for batch in chain(first[skipped:], batches):
            tensors = _tensors(batch)
            yield Batch(tensors, len(tensors[0]))

    def in_order(self) -> Iterator[Batch]:
        return self.epoch(0, 0)

    def width(self) -> int:
        return next((len(batch.tensors) for batch in self.in_order()), 1)

    def steps(self) -> int | None:
        if isinstance(self.loader, DataLoader) and isinstance(self.loader.dataset, IterableDataset):
            return None
        return len(self.loader) if isinstance(self.loader, Sized) else None


def batches_of(data: Data, batch_size: int | None, name: str = "data") -> Batches:
    """``data`` as batches of ``batch_size`` rows; None means all rows at once.

    Raises:
        TypeError, ValueError: ``data`` is nothing of the kind; the message begins with ``name``.
    """
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size: expected an integer ≥ 1, or None for all rows at once, got {batch_size!r}")
    data = csr_of(data)
    if isinstance(data, _ARRAYS):
        return _arrays((data,), batch_size, name)
    if isinstance(data, (tuple, list)) and data and all(isinstance(part, _ARRAYS) for part in data):
        return _arrays(tuple(data), batch_size, name)
    if isinstance(data, DataLoader):
        return _Loader(data)
    if isinstance(data, IterableDataset):
        raise TypeError(f"{name}: expected an IterableDataset to come in a DataLoader, which makes batches of it")
    if isinstance(data, Dataset):
        return _Items(data, torch.arange(len(data)), batch_size)  # type: ignore[arg-type]
    if isinstance(data, Iterator):
        raise TypeError(f"{name}: expected batches that can be gone through again, got a {type(data).__name__}")
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        return _Loader(data)
    raise TypeError(
        f"{name}: expected a tensor, an array, a tuple of these, a Dataset or a DataLoader, got {type(data).__name__}"
    )


def training_and_validation(
    data: Data, validation: Data | float | None, batch_size: int | None, seed: int
) -> tuple[Batches, Batches | None]:
    """What to train on, and what to measure on: data of its own, or a share of ``data``'s rows that ``seed`` picks."""
    train = batches_of(data, batch_size)
    if isinstance(validation, float | int):
        return train.split(float(validation), seed)
    return train, None if validation is None else batches_of(validation, None, "validation")


def _arrays(arrays: tuple[Array, ...], batch_size: int | None, name: str) -> Batches:
    for array in arrays:
        if array.ndim == 0 or len(array) != len(arrays[0]):
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise ValueError(f"{name}: expected arrays with the same number of rows N ≥ 1, got shapes {shapes}")
        if array.is_complex() if not isinstance(array, np.ndarray) else array.dtype.kind not in "fiub":
            raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if len(arrays[0]) == 0:
        raise ValueError(f"{name}: expected at least one row, got shape {list(arrays[0].shape)}")
    return _Arrays(arrays, torch.arange(len(arrays[0])), batch_size)


def _taken(array: Array, chosen: slice | Tensor) -> Tensor:
    if isinstance(array, Tensor) and array.layout == torch.sparse_csr:
        indices = torch.arange(chosen.start, chosen.stop) if isinstance(chosen, slice) else chosen
        return csr_rows_at(array, indices)
    if not isinstance(array, np.ndarray):
        return array[chosen if isinstance(chosen, slice) else chosen.to(array.device)]
    rows = array[chosen if isinstance(chosen, slice) else chosen.numpy()]
    # torch warns about memory it must not write, such as that of a file opened for reading.
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())


def _tensors(batch: Any) -> tuple[Tensor, ...]:
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    parts = tuple(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in parts)
    for part in parts:
        if not isinstance(part, Tensor) or part.dim() == 0:
            raise TypeError(f"data: expected batches of tensors with rows, got {type(part).__name__}")
    return parts


def _mixed(seed: int, number: int) -> int:
    """One seed from two."""
    return (seed * 1_000_003 + number) % 2**63
