"""The backend "cuda" is the emulated one here: the kernels' own source, run thread by thread on the CPU."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import pytest
from cuda_emulator import COMPILER, ROOT, build, load

import byol_fast as bf
from byol_fast.backends.cuda import Cuda


@pytest.fixture(scope="session")
def emulated() -> Cuda:
    """The kernels, compiled for the emulator (and kept in build/, for the next run)."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"the emulator is compiled by {COMPILER}, which is not here")
    kernels = Cuda(load(build(ROOT / "build" / "emulated")), None, "cpu")
    kernels.single_pass = False
    return kernels


@pytest.fixture
def cuda(emulated: Cuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The emulated kernels as the backend in force."""
    monkeypatch.setitem(sys.modules["byol_fast.backends"]._REGISTRY, "cuda", emulated)  # type: ignore[attr-defined]
    with bf.use_backend("cuda"):
        yield "cuda"
