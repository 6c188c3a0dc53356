"""The compiled CUDA module: it imports without a GPU, runs nowhere unasked, and holds the instructions it should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulator import ROOT, load

import byol_fast as bf
from byol_fast.backends import cuda

setup_cuda = load(ROOT / "setup_cuda.py", "setup_cuda")
# Bytes of stack, which is where spilled registers go. One kernel of float keeps 7 registers there, on sm_80.
STACK = 32

built = pytest.mark.skipif(cuda._cuda is None, reason=f"there are no CUDA kernels in this installation: {cuda._reason}")


def cuobjdump() -> str | None:
    """The disassembler: the toolkit has one, and so has Triton's wheel."""
    beside = [Path(nvcc).with_name("cuobjdump") for nvcc in [setup_cuda.find_nvcc()] if nvcc]
    try:
        import triton
    except ImportError:
        wheel = []
    else:
        wheel = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"]
    found = shutil.which("cuobjdump")
    return next((str(path) for path in [*([Path(found)] if found else []), *beside, *wheel] if path.exists()), None)


inspected = pytest.mark.skipif(cuda._cuda is None or cuobjdump() is None, reason="no CUDA module, or no cuobjdump")


@pytest.fixture(scope="module")
def resources() -> str:
    return dump("-res-usage")


def dump(*options: str) -> str:
    tool = cuobjdump()
    assert tool is not None
    done = subprocess.run([tool, *options, cuda._cuda.__file__], capture_output=True, text=True, check=True)
    return done.stdout


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_module_imports_and_says_so() -> None:
    status = bf.backends()["cuda"]
    assert not status.available
    assert "no GPU" in (status.reason or "")
    with pytest.raises(bf.BackendError, match="no GPU"):
        bf.use_backend("cuda")


def test_auto_does_not_run_what_no_gpu_has_verified() -> None:
    from byol_fast.backends import verified
    from byol_fast.backends.base import Call

    call = Call("bottleneck_mse_loss", torch.bfloat16, 65536, 1024, 1024, 32)
    assert verified.reason_against("cuda", call, torch.device("cuda"), findings={}) is not None


@built
def test_the_driver_is_not_linked() -> None:
    done = subprocess.run(["ldd", cuda._cuda.__file__], capture_output=True, text=True, check=True)
    assert not re.search(r"libcuda\.|libcudart|libtorch", done.stdout)


@inspected
def test_every_architecture_is_there(resources: str) -> None:
    assert set(re.findall(r"arch = (sm_\w+)", resources)) == {"sm_80", "sm_90", "sm_90a", "sm_100"}
    # PTX of sm_80, which a driver translates for whatever comes after, of each element type.
    assert len(re.findall(r"sm_80\.ptx", dump("-lptx"))) == 3


@inspected
def test_no_register_is_spilled(resources: str) -> None:
    used = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", resources)
    assert len(used) > 100
    assert [line for line in used if int(line[2]) > STACK] == []


def functions(architecture: str) -> Iterator[tuple[str, str]]:
    """Mangled name and machine code of every kernel for an architecture."""
    for part in dump("-sass", "-arch", architecture).split("Function : ")[1:]:
        yield part.split(None, 1)[0], part


@inspected
def test_the_portable_kernels_use_tensor_cores_and_asynchronous_copies() -> None:
    code = {name: text for name, text in functions("sm_80") if re.search(r"(rows|columns)_kernel", name)}
    # Three element types and four widths, of two kernels.
    assert len(code) == 24
    for name, text in code.items():
        assert "HMMA" in text, name
        assert "LDGSTS" in text, name
        assert "BF16" in text or "Bf16" not in name


@inspected
def test_the_cluster_kernel_uses_the_copy_engine_and_warpgroup_products() -> None:
    code = {name: text for name, text in functions("sm_90a") if "cluster_kernel" in name}
    # Two element types, untied and tied.
    assert len(code) == 4
    for name, text in code.items():
        assert "HGMMA" in text, name
        assert "UTMALDG" in text, name
        # Results are pushed, not fetched, across blocks, and nothing spills.
        assert "STAS" in text, name
        assert not re.search(r"\b(LDL|STL)\b", text), name
    # So does the probe of how fast they can be pushed, from a loop that holds little else.
    (probe,) = (text for name, text in functions("sm_90a") if "push_kernel" in name)
    assert "STAS" in probe


def test_a_build_is_kept_by_content() -> None:
    """Each object depends on the headers it includes, and on no other."""
    assert "cluster.h" not in setup_cuda._included("kernels.cu", set())
    assert "cluster.h" in setup_cuda._included("cluster.cu", set())
    assert "tile.h" in setup_cuda._included("kernels.cu", set())


def test_a_build_that_fails_fails_no_install_and_is_told(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    nvcc.chmod(0o755)
    # In a copy, so that nothing of this installation is built over.
    for name in ("setup.py", "setup_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "byol_fast").mkdir()
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "BYOL_FAST_BUILD_NATIVE": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "byol_fast" / "_build.json").read_text())["cuda_reason"]
    assert told.startswith("it could not be compiled when byol_fast was installed: ")


def test_the_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYOL_FAST_BUILD_CUDA", "0")
    assert setup_cuda.reason_against() == "it was built with BYOL_FAST_BUILD_CUDA=0"
