# `make quickstart` and `make test` need Python 3.11 or newer and make; they set everything else up.
PYTHON ?= python3
BIN := .venv/bin
# torch goes first and alone: this version has a CPU build, another one would bring CUDA along.
TORCH := torch==2.13.0

# Thousands of small programs that run once: to optimise them would take most of the time. CI does, on the newest JAX.
# Many are the same ones, in other tests or from the run before.
CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
QUICK := JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(CACHE)

# The compiler for TPUs is among the tools, and without this JAX would look for a TPU first.
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart quicktour test lint clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

quickstart: .venv/installed
	$(BIN)/python examples/01_quickstart.py $(ARGS)

quicktour: .venv/installed
	$(BIN)/python examples/02_quicktour.py $(ARGS)

test: .venv/installed
	$(QUICK) $(BIN)/python -m pytest --numprocesses auto $(ARGS)
	$(BIN)/python -m pytest --numprocesses auto --doctest-modules jpeft interop/jpeft_interop

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv .cache quickstart-out
