# Two commands set a fresh machine up: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# On Linux, PyTorch's default wheel carries CUDA (gigabytes). A CPU build is enough: point pip at one.
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help demo test test-slow test-gpu lint format clean

help:
	@echo "make demo       create the environment, generate a video, say where it is"
	@echo "make test       lint, types and the test suite (no GPU; under 20 minutes on 2 cores)"
	@echo "make test-slow  the tests that take longer"
	@echo "make test-gpu   the tests that need a GPU"
	@echo "make format     format the code"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[convert]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py outputs/demo

test: lint $(VENV)/.dev
	$(PYTEST)

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

test-gpu: $(VENV)/.dev
	JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
