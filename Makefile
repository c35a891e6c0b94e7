# The README's commands. Each target sets up .venv when it is missing or older than the lock file.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TESTS ?= tests

$(VENV)/.ready: requirements.lock pyproject.toml
	@echo "Setting up $(VENV) (about two minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps -e .
	@$(BIN)/pip check --disable-pip-version-check >/dev/null
	@touch $@

.PHONY: setup train test test-long lint bench gpu-kernels gpu-layer gpu-model
setup: $(VENV)/.ready

train: setup
	@$(BIN)/python -m transmamba.train $(ARGS)

test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long and not gpu" $(TESTS)

test-long: setup
	@$(BIN)/python -m pytest -m "long and not gpu" --timeout 1800 $(TESTS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

# On a machine with a GPU: every kernel against float64, then the scan beside its peers (PEERS="--mamba-ssm DIR --fla DIR").
gpu-kernels: setup
	@$(BIN)/transmamba doctor --kernels
	@$(BIN)/transmamba bench kernels --budget-s 360 $(PEERS)

# Layers and whole models of the 1.5B preset; each goes on where it was stopped.
gpu-layer: setup
	@$(BIN)/transmamba bench layer --budget-s 480

gpu-model: setup
	@$(BIN)/transmamba bench model --budget-s 480

bench: setup
	@$(BIN)/transmamba bench kernels
	@$(BIN)/transmamba bench step
