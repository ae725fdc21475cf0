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

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install pretrain plan test soak check static bench format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## the environment in .venv, pinned by constraints.txt

pretrain: .venv/.installed ## corpus, then the quickstart on four ranks; again: goes on, or says it is done
	@$(BIN)/dsv2 prepare --source stdlib --out data/stdlib
	@launch/local.sh experiment=quickstart $(ARGS)

plan: .venv/.installed ## what the 236B run would cost, without a GPU
	@$(BIN)/dsv2 plan experiment=dsv2_236b_pretrain $(ARGS)

test: static ## check, then every test that needs no GPU, in two processes side by side
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

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

format: .venv/.installed-dev ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build output; .venv, data and runs stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find dsv2_train tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3.11 and no python3 on PATH"; exit 1; }
	@echo "making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing dependencies into .venv (a few minutes the first time)"
	@$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "installing the tools of the tests into .venv"
	@$(PIP) --editable ".[dev]"
	@touch $@
