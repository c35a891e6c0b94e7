# The README's commands. Each target sets up .venv when it is missing or older than the lock file; with `VENV=` it installs
# nothing and runs in the environment of $(PYTHON), for images that bring their own torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(if $(VENV),$(BIN)/python,$(PYTHON))
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
setup: $(if $(VENV),$(VENV)/.ready)

train: setup
	@$(RUN) -m transmamba.train $(ARGS)

test: setup
	@$(RUN) -m pytest -n 2 --dist loadgroup -m "not long and not gpu" $(TESTS)

test-long: setup
	@$(RUN) -m pytest -m "long and not gpu" --timeout 1800 $(TESTS)

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m pyright

# On a machine with a GPU: every kernel against float64, then the scan beside its peers (PEERS="--mamba-ssm DIR --fla DIR").
gpu-kernels: setup
	@$(RUN) -m transmamba doctor --kernels
	@$(RUN) -m transmamba bench kernels --budget-s 360 $(PEERS)

# Layers and whole models of the 1.5B preset; each goes on where it was stopped.
gpu-layer: setup
	@$(RUN) -m transmamba bench layer --budget-s 480

gpu-model: setup
	@$(RUN) -m transmamba bench model --budget-s 480

bench: setup
	@$(RUN) -m transmamba bench kernels
	@$(RUN) -m transmamba bench step
