"""Builds the native core, byol_fast._native, and where nvcc is found the CUDA kernels, byol_fast._cuda (setup_cuda.py);
everything else about the package is in pyproject.toml.

The same kernels are compiled once per instruction set and chosen at run time, so a wheel built on one machine runs on
an older one. A build that fails never fails the install: the package then runs on plain PyTorch, and the reason is kept
in byol_fast/_build.json for `byol-fast info`. BYOL_FAST_BUILD_NATIVE=0 leaves the native core out,
BYOL_FAST_BUILD_CUDA=0 the CUDA kernels.
"""

import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# A build in isolation does not look for modules beside this file.
sys.path.insert(0, str(Path(__file__).parent))
import setup_cuda

FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"]

# Name, bytes of a vector register, rows of the register tile (2·rows accumulators and 3 operands must fit the register
# file), compiler flags.
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
X86 = [
    # Linux only, for the system has to be asked for the tiles.
    *([("amx", 64, 12, f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16")] if sys.platform == "linux" else []),
    ("avx512_bf16", 64, 12, f"{AVX512} -mavx512bf16"),
    ("avx512", 64, 12, AVX512),
    ("avx2", 32, 6, "-mavx2 -mfma -mf16c"),
    ("portable", 16, 6, ""),
]
OTHERS = [("portable", 16, 12, "")]


def instruction_sets():
    return X86 if platform.machine().lower() in ("x86_64", "amd64") else OTHERS


def presence(sets):
    """Macros that tell dispatch.cpp which instruction sets there are."""
    return [(f"BYOL_HAS_{name.upper()}", "1") for name, *_ in sets]


def _name(extension):
    return extension.name.rpartition("_")[2]


class BuildExtensions(build_ext):
    """Builds each extension module by itself; what cannot be built is left out, and the reason is kept."""

    def run(self):
        self.reasons = {"native": self._left_out(), "cuda": setup_cuda.reason_against()}
        self.extensions = [extension for extension in self.extensions if not self.reasons[_name(extension)]]
        inplace = self.inplace
        try:
            super().run()
        except Exception as error:
            for extension in self.extensions:
                self._fail(extension, error)
        record = Path(self.build_lib, "byol_fast", "_build.json")
        if inplace:
            record = Path("byol_fast", "_build.json")
        record.parent.mkdir(parents=True, exist_ok=True)
        reasons = {"reason": self.reasons["native"], "cuda_reason": self.reasons["cuda"]}
        record.write_text(json.dumps(reasons) + "\n")

    def _left_out(self):
        return "it was built with BYOL_FAST_BUILD_NATIVE=0" if os.environ.get("BYOL_FAST_BUILD_NATIVE") == "0" else None

    def _fail(self, extension, error):
        reason = f"it could not be compiled when byol_fast was installed: {type(error).__name__}: {error}"
        self.announce(f"byol_fast is installed without {extension.name}: {reason}", level=3)
        self.reasons[_name(extension)] = reason

    def build_extension(self, extension):
        try:
            self._build(extension)
        except Exception as error:
            self._fail(extension, error)

    def _build(self, extension):
        import pybind11

        extension.include_dirs.append(pybind11.get_include())
        if extension.name == "byol_fast._cuda":
            setup_cuda.compile_objects(extension, Path(self.build_temp, "cuda"))
            extension.extra_compile_args = FLAGS
        else:
            self._compile_native(extension)
        super().build_extension(extension)

    def _compile_native(self, extension):
        """Compiles csrc/cpu/kernels.cpp once per instruction set and makes the extension link everything."""
        extension.include_dirs.append("csrc")
        sets = [isa for isa in instruction_sets() if self._accepts(isa[-1].split())]
        macros = presence(sets)
        compiler_name = os.path.basename((getattr(self.compiler, "compiler_cxx", None) or ["unknown"])[0])
        macros.append(("BYOL_COMPILER", json.dumps(compiler_name)))
        jobs = [(source, macros, [], self.build_temp) for source in extension.sources]
        for name, vector_bytes, tile_rows, flags in sets:
            isa = [("BYOL_ISA", name), ("BYOL_VECTOR_BYTES", str(vector_bytes)), ("BYOL_TILE_ROWS", str(tile_rows))]
            jobs.append(("csrc/cpu/kernels.cpp", isa, flags.split(), os.path.join(self.build_temp, name)))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [pool.submit(self._compile, extension, *job) for job in jobs]
        extension.extra_objects = [name for job in objects for name in job.result()]
        extension.sources = []

    def _accepts(self, flags):
        """Whether the compiler has an instruction set: what it is too old for is left out."""
        probe = Path(self.build_temp, "probe.cpp")
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        try:
            self.compiler.compile([str(probe)], output_dir=str(probe.parent), extra_postargs=flags)
        except Exception as error:
            self.announce(f"the compiler does not know {' '.join(flags)}: {error}", level=3)
            return False
        return True

    def _compile(self, extension, source, macros, flags, output_dir):
        return self.compiler.compile(
            [source],
            output_dir=output_dir,
            macros=macros,
            include_dirs=extension.include_dirs,
            extra_postargs=FLAGS + flags,
            depends=extension.depends,
        )


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "byol_fast._native",
                sources=["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/memory.cpp", "csrc/cpu/parallel.cpp"],
                depends=[str(path) for path in Path("csrc", "cpu").glob("*.h")],
                libraries=["dl", "pthread"] if os.name == "posix" else [],
                language="c++",
                # What could not be built is missing afterwards, and that is no error.
                optional=True,
            ),
            setup_cuda.extension(),
        ],
        cmdclass={"build_ext": BuildExtensions},
    )
