# `make` lists the targets. Every target sets up .venv first where it has to; PYTHON=... names another interpreter.
PY := .venv/bin/python
# More than the cores of a small machine: tests of several processes wait for one another.
JOBS ?= 3
PYTEST := $(PY) -m pytest -q
# One thread a worker: workers share the cores, and sums then have one order.
# A file stays with one worker: what its first test compiles, the next ones reuse. tests/conftest.py orders the files.
# JAX compiles thousands of programs of a few numbers each: XLA's own passes as ever, LLVM's optimisations left out.
SPREAD := OMP_NUM_THREADS=1 JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Where it is set, every process compiles tests and packages anew.
unexport PYTHONDONTWRITEBYTECODE
title = @printf '\n== %s\n' "$(1)"

.NOTPARALLEL:
.PHONY: help venv demo test lint test-core test-torch test-jax test-both test-docs vectors notebooks bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: ## make or update .venv; at once where nothing changed
	@.ci/venv

demo: venv ## three checkpoints compared, a seeded fault found; figure and page in demo_out
	@$(PY) -m moebius.compare.demo --folder demo_out

test: lint test-core test-torch test-jax test-both test-docs ## lint and every test stage, in the order below; the first failure stops
	@printf '\nall stages passed\n'

lint: venv ## ruff, mypy, and who may import whom
	$(call title,lint: ruff check)
	@.venv/bin/ruff check .
	$(call title,lint: ruff format)
	@.venv/bin/ruff format --check .
	$(call title,lint: mypy)
	@MYPY_NUM_WORKERS=2 $(PY) -m mypy -p moebius
	$(call title,lint: import-linter)
	@.venv/bin/lint-imports --no-logo

test-core: ## core alone, where neither torch nor jax is installed
	@.ci/venv core
	$(call title,tests: core with NumPy alone)
	@.venv-core/bin/python -m pytest -q tests/core

test-torch: venv ## the PyTorch frontend
	$(call title,tests: torch)
	@$(SPREAD) tests/torch

test-jax: venv ## the Flax frontend
	$(call title,tests: jax)
	@$(SPREAD) tests/jax

test-both: venv ## both frontends in one process, and the project itself
	$(call title,tests: both frontends and the project)
	@$(SPREAD) tests/cross tests/gpu tests/project

test-docs: venv ## the examples in docstrings
	$(call title,tests: docstrings)
	@$(PYTEST) --doctest-modules src/moebius/core src/moebius/torch_frontend src/moebius/jax_frontend src/moebius/compare

vectors: venv ## write the golden vectors again
	@$(PY) -m moebius.core.vectors --write

notebooks: venv ## run the notebooks and write them back with their outputs
	@$(PY) notebooks/execute.py

bench: venv ## the benchmarks
	@$(PY) -m benchmarks

clean: ## remove what tools left behind; environments stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
