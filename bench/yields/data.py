"""Fashion-MNIST, and matrices of its patches on disk, as large as wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from examples.data import fashion_mnist

SIDE = 10


def images() -> Tensor:
    """The 60,000 training images, ``[60000, 784]``, float32 in 0 … 1."""
    return fashion_mnist()[0].images.reshape(-1, 784).float() / 255


def write_patches(path: Path, rows: int) -> None:
    """Patches of 10 × 10 pixels, float32 ``[rows, 100]``: every image at one place, then at the next, then mirrored.

    There are 43 million different ones. Their mean drifts along the file, as that of sorted data does.
    """
    pictures = images().reshape(-1, 28, 28)
    places = [(flip, y, x) for flip in (False, True) for y in range(29 - SIDE) for x in range(29 - SIDE)]
    if rows > len(places) * len(pictures):
        raise ValueError(f"rows: expected at most {len(places) * len(pictures)}, got {rows}")
    # Places in another order, so that few rows are not all of one corner.
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist()
    with open(path, "wb") as file:
        npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, SIDE * SIDE)})
        left = rows
        for flip, y, x in (places[index] for index in order):
            whole = pictures.flip(2) if flip else pictures
            block = whole[:left, y : y + SIDE, x : x + SIDE].reshape(-1, SIDE * SIDE)
            file.write(memoryview(np.ascontiguousarray(block.numpy())).cast("B"))
            left -= len(block)
            if left == 0:
                break
