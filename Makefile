# Two commands for a newcomer: `make simulate` and `make test`. Both do all the set-up on a fresh machine.
# The CPU build of torch is installed first, since a plain `pip install torch` pulls gigabytes of CUDA.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := common client server simulations tests

.PHONY: simulate test test-slow e2e lint check setup clean

simulate: $(READY)
	$(BIN)/fedmedgan-simulate $(ARGS)

test: $(READY)
	$(BIN)/pytest -n 2 --dist loadgroup

# The audits and other long tests alone, with what they print.
test-slow: $(READY)
	$(BIN)/pytest -n 2 --dist loadgroup -m slow -rP

# A coordinator and three hospitals as they are run, from `init` to a generator: when all is well, and then with 20 kills,
# 2 cuts, a full disk, an expired certificate, an unregistered node and a wrong CA, all drawn from FAULTS_SEED; then behind
# a bad line. `make test` has the first of the three.
FAULTS_SEED ?= 1
e2e: $(READY)
	FEDMEDGAN_E2E=whole FEDMEDGAN_FAULTS_SEED=$(FAULTS_SEED) $(BIN)/pytest -n 0 -s tests/e2e/test_deployment.py

# What needs no test to run: form, types, layers, docstrings and their examples.
lint: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/interrogate -q common client server simulations
	$(BIN)/pytest --doctest-modules common client server simulations -p no:warnings

check: lint
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not e2e"

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
