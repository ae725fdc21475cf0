# Two commands: `make pretrain` trains a small DeepSeek-V2 here, `make test` proves what is claimed.
#
# PYTHON       a Python >= 3.11 with venv and headers         make test PYTHON=python3.12
# TORCH_INDEX  package index to take torch from; on x86-64 the default one brings CUDA (gigabytes)
#              for a CPU alone, the address of PyTorch's own index of CPU wheels
# ARGS         more overrides                                 make pretrain ARGS="recipe.num_steps=50"
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Without it every test of a kernel on a GPU is skipped.
HAVE_KERNELS := $(BIN)/python -m dsv2_kernels.native.library

# Tests that start no ranks run two at a time, the others by themselves.
OF_ONE_PROCESS := tests/unit tests/house tests/benchmarks kernels/tests
OF_RANKS := tests/distributed tests/numerics tests/slurm

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install pretrain plan test soak check static bench format clean
.PHONY: kernels test-gpu sanitize-gpu bench-gpu

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## the environment in .venv, pinned by constraints.txt

pretrain: .venv/.installed ## corpus, then the quickstart on four ranks; again: goes on, or says it is done
	@$(BIN)/dsv2 prepare --source stdlib --out data/stdlib
	@launch/local.sh experiment=quickstart $(ARGS)

plan: .venv/.installed ## what the 236B run would cost, without a GPU
	@$(BIN)/dsv2 plan experiment=dsv2_236b_pretrain $(ARGS)

test: static ## check, then every test that needs no GPU; ARGS with a path, -k or -m: those alone
ifeq ($(findstring tests/,$(ARGS))$(filter -k -m,$(ARGS)),)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS) $(OF_ONE_PROCESS)
	$(BIN)/python -m pytest $(ARGS) $(OF_RANKS)
else
	$(BIN)/python -m pytest $(ARGS)
endif

soak: .venv/.installed-dev ## trials at full count: reshapes, damages, kills; hours
	$(BIN)/python -m pytest --soak -m soak $(ARGS)

check: static ## ruff, mypy, import contracts, house rules
	$(BIN)/python -m pytest tests/house

static: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed-dev ## ours, megatron-core and transformers side by side, one thread
	$(BIN)/python -m benchmarks $(ARGS)

kernels: .venv/.installed ## our CUDA kernels, by nvcc for sm_80 and sm_90a; ARGS=--debug: indices are checked
	@$(PIP) --editable kernels
	@$(BIN)/python -m dsv2_kernels.native.build cuda $(ARGS)

test-gpu: .venv/.installed-dev ## every test that needs a GPU
	@$(HAVE_KERNELS)
	$(BIN)/python -m pytest -m gpu $(ARGS) tests kernels/tests

sanitize-gpu: .venv/.installed-dev ## the kernels' tests under compute-sanitizer: memory, races, barriers
	@$(HAVE_KERNELS)
	for tool in memcheck racecheck synccheck; do PYTHON=$(BIN)/python kernels/sanitize.sh $$tool $(ARGS) || exit 1; done

bench-gpu: .venv/.installed-dev ## kernels beside their peers, then layers of DeepSeek-V2, on a GPU
	cd kernels && ../$(BIN)/python -m bench $(ARGS)
	$(BIN)/python -m benchmarks layers

format: .venv/.installed-dev ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build output; .venv, data and runs stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf kernels/dsv2_kernels/native/built
	find dsv2_train tests benchmarks kernels -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3.11 and no python3 on PATH"; exit 1; }
	@echo "making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing dependencies into .venv (a few minutes the first time)"
	@$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed kernels/pyproject.toml
	@echo "installing the tools of the tests into .venv"
	@$(PIP) --editable ".[dev]" --editable kernels
	@touch $@
