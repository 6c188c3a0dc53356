"""Builds the CUDA kernels, byol_fast._cuda, where nvcc is found; used by setup.py.

One object for each element type, all architectures in it, compiled in parallel and kept by content in a cache folder
(BYOL_FAST_CACHE, else ~/.cache/byol_fast), so that the next build takes seconds. The CUDA runtime is linked statically
and the driver not at all: the module imports on machines without a GPU. BYOL_FAST_BUILD_CUDA=0 leaves the kernels out.
"""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension

SOURCES = Path(__file__).parent / "csrc" / "cuda"
# The portable kernels are translated to PTX once and assembled for each architecture; PTX is for what comes after.
PORTABLE = ["-gencode=arch=compute_80,code=[sm_80,sm_90,sm_100,compute_80]"]
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# Hopper's own instructions exist on Hopper only.
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]
# Source, macros, architectures.
OBJECTS = [("kernels.cu", [f"-DBYOL_ELEMENT={element}"], PORTABLE) for element in ("Bf16", "Fp16", "float")]
OBJECTS += [(source, [], HOPPER) for source in ("cluster.cu", "push_rate.cu")]


def find_nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home, "bin", "nvcc")] if home else []
    found = shutil.which("nvcc")
    places += [Path(found)] if found else []
    return next((str(place) for place in [*places, Path("/usr/local/cuda/bin/nvcc")] if place.exists()), None)


def toolkit(nvcc):
    """The folder of the CUDA toolkit: nvcc says it, wherever a link or a wrapper lies."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True)
    top = next(line.split("=", 1)[1] for line in done.stderr.splitlines() if line.startswith("#$ TOP="))
    return Path(top).resolve()


def reason_against():
    """None, or why there will be no CUDA kernels."""
    if os.environ.get("BYOL_FAST_BUILD_CUDA") == "0":
        return "it was built with BYOL_FAST_BUILD_CUDA=0"
    if os.name != "posix":
        return "its build is only known to work on Linux"
    if find_nvcc() is None:
        return "there was no nvcc when byol_fast was installed"
    return None


def extension():
    """The extension module; its objects are compiled by :func:`compile_objects`."""
    return Extension("byol_fast._cuda", sources=["csrc/bindings_cuda.cpp"], language="c++", optional=True)


def compile_objects(extension, folder):
    """Compiles the kernels and makes the extension link them."""
    nvcc = find_nvcc()
    home = toolkit(nvcc)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(lambda job: _compile(nvcc, Path(folder), *job), OBJECTS))
    libraries = [str(path) for path in (home / "lib64", home / "lib") if (path / "libcudart_static.a").exists()]
    extension.extra_objects = [str(path) for path in objects]
    extension.include_dirs += ["csrc", str(home / "include")]
    extension.library_dirs += libraries
    extension.libraries += ["cudart_static", "rt", "dl", "pthread"]


def _compile(nvcc, folder, source, macros, architectures):
    """The object of one source, from the cache if its content was compiled before."""
    command = [nvcc, *FLAGS, *macros, *architectures]
    key = _digest(nvcc, command, source)
    result = folder / f"{Path(source).stem}-{key[:16]}.o"
    cached = _cache() / f"{key}.o"
    if not result.exists() and cached.exists():
        shutil.copyfile(cached, result)
    if not result.exists():
        done = subprocess.run(
            [*command, "-I", str(SOURCES), "-c", str(SOURCES / source), "-o", str(result)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source}: {(done.stderr or done.stdout).strip()[-2000:]}")
        _keep(result, cached)
    return result


def _digest(nvcc, command, source):
    digest = hashlib.sha256(" ".join(command).encode())
    digest.update(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    for name in sorted(_included(source, set())):
        digest.update(name.encode() + Path(SOURCES, name).read_bytes())
    return digest.hexdigest()


def _included(name, found):
    """The names of a source and of all headers here that it includes."""
    found.add(name)
    for header in re.findall(r'#include "(\w+\.h)"', Path(SOURCES, name).read_text(encoding="utf-8")):
        if header not in found and Path(SOURCES, header).exists():
            _included(header, found)
    return found


def _cache():
    chosen = os.environ.get("BYOL_FAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "byol_fast")


def _keep(result, cached):
    """Puts an object into the cache, in one step; a cache that cannot be written is done without."""
    beside = cached.with_suffix(f".{os.getpid()}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result, beside)
        os.replace(beside, cached)
    except OSError:
        beside.unlink(missing_ok=True)
