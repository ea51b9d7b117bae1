# Two commands set a fresh machine up: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# On Linux, PyTorch's default wheel carries CUDA (gigabytes). A CPU build is enough: point pip at one.
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin

# The toy recipe in order: every run begins with the export of the one before it (docs/training.md), the last
# two with the mean of late exports of `long`.
TOY_RUNS := vae_images vae vae_decoder text teacher_block teacher causal_init init long
TOY_TUNING := reader reward
TOY_MEAN := $(addprefix runs/toy/long/exports/,000360 000420 000480 000540)
# Where `make toy-bundle` finds them, and what it ships.
TOY ?= runs/toy
SHIPPED ?= $(TOY)/reward/export

PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
# Compiling is most of a short test: without LLVM's optimisations (XLA's own remain, and what the audits of
# compiled programs look at) the suite takes a quarter less. `make test QUICK=0` tests what users run.
QUICK ?= 1

.PHONY: help demo toy toy-bundle test test-slow test-gpu test-cuda-compiler lint format clean

help:
	@echo "make demo       create the environment, generate a video, say where it is"
	@echo "make toy        train the toy model, every stage in order; goes on where it was stopped"
	@echo "make toy-bundle store, measure and describe it as the model that comes with the package"
	@echo "make test       lint, types and the test suite (no GPU; some 20 minutes on 2 cores)"
	@echo "make test-slow  the tests that take longer"
	@echo "make test-gpu   the tests that need a GPU"
	@echo "make test-cuda-compiler  compile the kernels for a Hopper GPU without one (CUDA_HOME with ptxas)"
	@echo "make format     format the code"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml Makefile | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	@touch $@

# vbench without what its networks need: a test runs its code that looks for files, on its own list.
$(VENV)/.dev: pyproject.toml Makefile | $(BIN)/python
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps vbench==0.1.5
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py outputs/demo

# A finished run has a report, and is not touched again.
define trained
	@for run in $(1); do \
	  test -f runs/toy/$$run/report.json || \
	  $(BIN)/longlive train configs/toy/$$run.py --resume auto || exit $$?; \
	done
endef

toy: $(VENV)/.demo
	$(call trained,$(TOY_RUNS))
	@test -d runs/toy/long/mean || \
	  $(BIN)/python -m longlive_jax.toy.bundle weights --runs runs/toy --to runs/toy/long/mean $(TOY_MEAN)
	$(call trained,$(TOY_TUNING))

# What is measured is what is shipped. Goes on where it was stopped, like the training.
toy-bundle: $(VENV)/.demo
	$(BIN)/python -m longlive_jax.toy.bundle weights --runs $(TOY) $(SHIPPED)
	$(BIN)/python -m benchmarks.toy_model toy --compare init=$(TOY)/init/export --compare long=$(TOY)/long/mean
	$(BIN)/python -m longlive_jax.toy.bundle card --results benchmarks/results/toy_model.json
	$(BIN)/python examples/demo.py outputs/demo
	mkdir -p docs/images
	cp outputs/demo/demo.png docs/images/toy_demo.png

test: lint $(VENV)/.dev
	JAX_DISABLE_MOST_OPTIMIZATIONS=$(QUICK) $(PYTEST)

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

test-gpu: $(VENV)/.dev
	JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest -m gpu

test-cuda-compiler: $(VENV)/.dev
	$(PYTEST) -m cuda_compiler

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
