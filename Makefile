# `make demo` and `make test` do all the set-up themselves; both work in a fresh clone.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc dla dla_kernels -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: help demo test test-all bench lint format clean

help:
	@echo "make demo      train DLA-L-20, MRLA-L-20 and ResNet-20 on handwritten digits; results in demo/"
	@echo "make test      the tests"
	@echo "make test-all  the tests with the slow ones"
	@echo "make bench     what each layer interaction costs against the plain network, on this machine"
	@echo "make lint      check style;  make format  mend it"

demo: $(VENV)/.package
	$(BIN)/python -m dla.demo --out demo

# The tests import the installed package, never the source tree: pytest is started so that it does not see the latter.
test: $(VENV)/.package
	$(BIN)/pytest -n 2 -m "not slow"

test-all: $(VENV)/.package
	$(BIN)/pytest -n 2

bench: $(VENV)/.package
	$(BIN)/pytest benchmarks/models.py

lint: $(VENV)/.package
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.package
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build *.egg-info demo

$(VENV)/.dependencies: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '.[dev]'
	touch $@

$(VENV)/.package: $(VENV)/.dependencies setup.py $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@
