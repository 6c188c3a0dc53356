# Everything here makes its own environment in .venv; nothing else is needed than Python ≥ 3.10, make and, for the native
# core, a C++17 compiler.
PYTHON ?= python3
# Pinned to a CPU build: a bare `torch` may bring several gigabytes of CUDA libraries, which nothing here needs.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(shell find csrc -type f 2>/dev/null)

.PHONY: test instruction-sets demo examples lint bench bench-quick bench-compress gpu triton-offline triton36 bench-yield sanitize arm64 fuzz wheel clean
.DEFAULT_GOAL := test

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

# Editable, so that Python files are used as they are; C++ files are compiled again when they change.
$(INSTALLED): $(VENV)/.torch pyproject.toml setup.py setup_cuda.py $(NATIVE)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

demo: $(INSTALLED)
	$(BIN)/byol-fast demo

# Fetches 150 MB into the cache folder, $BYOL_FAST_DATA or ~/.cache/byol_fast, the first time.
examples: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[examples]"
	$(BIN)/python -m examples.image
	$(BIN)/python -m examples.text
	$(BIN)/python -m examples.recommend
	$(BIN)/python -m examples.report

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m bench

bench-quick: $(INSTALLED)
	$(BIN)/python -m bench --quick

# Whole real models, fetched once; long.
bench-compress: $(INSTALLED)
	$(BIN)/python -m bench.compress

# On a machine with a GPU, in the Python that is there, which has torch and triton: nothing is installed.
gpu:
	PYTHONPATH=. $(PYTHON) -m bench.gpu

# Every Triton kernel compiled for every architecture, without a GPU: many minutes.
triton-offline: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python tests/triton/offline.py

# The oldest Triton that is supported, with the torch it belongs to, in an environment of its own. PyPI has that torch
# with CUDA only: 5 GB of disk. Its interpreter fails on loops with run-time bounds under later versions of numpy.
triton36:
	$(PYTHON) -m venv .venv-triton36
	.venv-triton36/bin/python -m pip install --quiet "torch~=2.11.0" "triton~=3.6.0" "numpy<2.4" tqdm safetensors pytest hypothesis expecttest
	.venv-triton36/bin/python -m pytest -q tests/triton

# Principal components against scikit-learn and PyTorch; fetches Fashion-MNIST, and needs 16 GB of disk for a while.
bench-yield: $(INSTALLED)
	$(BIN)/python -m bench.yields

# The native core under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.
sanitize: $(INSTALLED)
	$(BIN)/python tests/native/fuzz.py address
	$(BIN)/python tests/native/fuzz.py thread

# The native core cross-compiled for arm64 and run under emulation; Debian: g++-aarch64-linux-gnu, qemu-user-static.
arm64: $(INSTALLED)
	$(BIN)/python tests/native/fuzz.py arm64 --cases 100

# The tests of the kernels on every instruction set that this processor has, but for the one that `make test` runs on.
instruction-sets: $(INSTALLED)
	for set in $$($(BIN)/python -c "from byol_fast import _native; print(*_native.info()['runnable_instruction_sets'][1:])"); do \
	  echo "BYOL_FAST_CPU=$$set"; \
	  BYOL_FAST_CPU=$$set $(BIN)/python -m pytest -q -k native tests/test_bottleneck.py tests/test_bottleneck_mse_loss.py \
	    tests/test_mse_loss.py tests/test_sparse.py tests/test_svd.py || exit 1; \
	done

fuzz: $(INSTALLED)
	$(BIN)/python tests/native/fuzz.py plain --first $$(date +%s) --cases 5000

wheel: $(VENV)/.torch
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info byol_fast/*.so byol_fast/_build.json $(VENV)
