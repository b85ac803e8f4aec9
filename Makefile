# Needs make and Python >= 3.11 with venv; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# test workers share the cores among themselves: a thread pool inside each would only fight
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# On a GPU nothing is installed: the interpreter there has torch, triton, pytest, pytest-xdist and hypothesis.
GPU_PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))
GPU = $(GPU_PYTHON) -m pytest -n $(JOBS) --dist worksteal -m gpu -W default -p no:cacheprovider

.PHONY: help demo test test-full test-newest test-gpu test-gpu-all sanitize-gpu docs lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       backends, verification, two minutes of training on text, one picture"
	@echo "make test       format, lint, types and the CPU suite"
	@echo "make test-full  the same with every combination of options"
	@echo "make test-newest  the models under the newest transformers that pip finds, which users get"
	@echo "make test-gpu   every property and every kernel on a GPU, with PYTHON as it is: nothing is installed"
	@echo "make test-gpu-all  the same with every combination of options"
	@echo "make sanitize-gpu  small calls of every kind under compute-sanitizer: memory, races, barriers"
	@echo "make docs       the documentation site, its pages run, its links checked: docs/_build/html/index.html"
	@echo "make format     rewrite the sources as ruff formats them"
	@echo "make clean      remove .venv and every build output"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "linattn needs Python 3.11 or later; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make a virtual environment with pip; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/linattn demo --out out/demo

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow and not gpu" --hypothesis-profile=ci

test-full: lint
	$(PYTEST) -m "not gpu" --hypothesis-profile=full

# beside .venv, which keeps the version that it has; what will go some day only warns
NEWEST := .venv/newest
test-newest: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(NEWEST) transformers
	PYTHONPATH=$(NEWEST) $(PYTEST) -W default -m "not slow and not gpu" --hypothesis-profile=ci tests/models tests/integrations tests/train

test-gpu:
	$(GPU) tests/gpu

test-gpu-all:
	$(GPU) --all tests/gpu

# Kernels are compiled beforehand: under a sanitizer that would take minutes. PARTS processes share the calls.
PARTS ?= 4
SANITIZED = triton cupy
sanitize-gpu:
	for backend in $(SANITIZED); do \
	    $(GPU_PYTHON) -m tests.gpu.sanitized --backend $$backend --compile || exit 1; \
	    for tool in memcheck racecheck initcheck synccheck; do \
	        echo "$$backend under $$tool"; \
	        seq 0 $$(($(PARTS) - 1)) | xargs -P $(PARTS) -I{} compute-sanitizer --tool $$tool --error-exitcode 1 \
	            $(GPU_PYTHON) -m tests.gpu.sanitized --backend $$backend --part {} --of $(PARTS) \
	            $$(test $$tool = initcheck && echo --zeros) || exit 1; \
	    done; \
	done

# The whole site is made anew: its pages are results of the library, which Sphinx does not watch.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	rm -rf docs/_build
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -E -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

format: $(STAMP)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist docs/_build linattn.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
