# `make demo` and `make test` do all the set-up themselves; both work in a fresh clone.
# They run the installed package, never the source tree: the programs of $(BIN) do not look into this folder.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
CPP := $(shell find csrc tests/cuda_on_cpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(filter csrc/%,$(CPP)) $(shell find dla dla_kernels benchmarks -name '*.py')

.PHONY: help demo test test-all fuzz sanitize bench tables gpu lint format clean

help:
	@echo "make demo      train DLA-L-20, MRLA-L-20 and ResNet-20 on handwritten digits; results in demo/"
	@echo "make test      the tests"
	@echo "make test-all  the tests with the slow ones"
	@echo "make fuzz      every op on 10000 random shapes, layouts and dtypes"
	@echo "make sanitize  the ops' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench     what ops, blocks and models cost on this machine; results in benchmarks/results/, then make tables"
	@echo "make tables    bring the tables of README and docs, and the choice between backends, up to date with"
	@echo "               benchmarks/results/"
	@echo "make gpu       tests, compute-sanitizer and benchmarks of the kernels on this machine's GPU; results in benchmarks/results/"
	@echo "make lint      check style;  make format  mend it"

demo: $(VENV)/.package
	$(BIN)/dla-demo --out demo

test: $(VENV)/.package
	$(BIN)/pytest -n 2 -m "not slow"

test-all: $(VENV)/.package
	$(BIN)/pytest -n 2

fuzz: $(VENV)/.package
	$(BIN)/pytest -n 2 --hypothesis-profile fuzz tests/test_dla_kernels/test_fused.py -k any_shape

# An install of its own, which comes before that of $(VENV) on the path. Python itself is not sanitized: the runtimes
# are loaded first, and its leaks are its own.
sanitize: $(VENV)/.dependencies
	DLA_KERNELS_CUDA=0 CXXFLAGS="$(SANITIZE) -O1" LDFLAGS="$(SANITIZE)" \
		$(BIN)/pip install --quiet --no-build-isolation --no-deps --upgrade --target build/sanitized .
	PYTHONPATH=build/sanitized ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)" \
		$(BIN)/pytest tests/test_dla_kernels/test_fused.py

bench: $(VENV)/.package
	$(BIN)/dla bench --out benchmarks/results
	$(MAKE) tables

tables: $(VENV)/.package
	$(BIN)/python -I -m dla.benchmarks.report README.md docs/kernels.md
	$(BIN)/python -I -m dla.benchmarks.choice

# OFFLINE=1, where nothing can be downloaded: the packages that $(PYTHON) has, and ours in a folder before them.
ifdef OFFLINE
gpu:
	DLA_KERNELS_CUDA=1 $(PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade \
		--target build/offline .
	PYTHONPATH=$(CURDIR)/build/offline:$(PYTHONPATH) $(PYTHON) benchmarks/gpu.py $(GPU)
else
gpu: $(VENV)/.package
	$(BIN)/python benchmarks/gpu.py $(GPU)
endif

lint: $(VENV)/.package
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.package
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build *.egg-info demo

# Without a compiler the package itself takes no time; .package installs it again, with one.
$(VENV)/.dependencies: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet setuptools torch pybind11
	CXX=none DLA_KERNELS_CUDA=0 $(BIN)/pip install --quiet --no-build-isolation --check-build-dependencies '.[dev]'
	touch $@

$(VENV)/.package: $(VENV)/.dependencies setup.py $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	touch $@
