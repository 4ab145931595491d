# `make demo` and `make test` work in a fresh clone: they create .venv, install torch, build and run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
# Backends that must be usable: the tests fail, rather than skip, without them.
export TRM_FAST_EXPECT ?= cpp,triton

VENV ?= .venv
BIN := $(VENV)/bin
# One stamp per torch, so that another TORCH is installed when it is asked for.
INSTALLED := $(VENV)/installed-$(subst /,_,$(TORCH))
INSTALLED_BENCH := $(INSTALLED)-bench
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check "$(TORCH)" $(MORE)
CSRC := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.cuh)

# The compile step finds ninja there.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test quick test-long test-oldest on-oldest bench lint build clean
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/\1 \2/p' Makefile | while read name text; do \
		printf '%-10s %s\n' "$$name" "$$text"; done

demo: build ## train on real data and show the result, in runs/demo
	$(BIN)/trm-fast train sudoku --out runs/demo --overwrite
	$(BIN)/trm-fast report runs/demo --html

# One thread per process: the tensors of the tests are too small to share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

test: lint build ## check style and types, then run the test suite
	$(PYTEST) -m "not long"

quick: build ## run for less than a minute: no compiler, processes or Triton, one case of each test
	$(PYTEST) --quick

test-long: build ## run the rest: a wheel from scratch, every GPU, the other half of large grids, kills
	$(PYTEST) -m long

# The oldest torch of pyproject.toml, with the Triton that belongs to it, whose interpreter takes no
# later NumPy. One build of the libraries serves every torch.
test-oldest: build ## run what compiles, and one case of each other test, on the oldest torch
	$(MAKE) VENV=.venv-oldest TORCH=torch==2.11.0 TRITON=triton==3.6.0 MORE='"numpy<2.3"' on-oldest

on-oldest: $(INSTALLED)
	$(PYTEST) -m "compile and not long"
	$(PYTEST) --quick

# Options of pytest and pytest-benchmark, such as BENCH="-k muon --benchmark-json=muon.json".
bench: build $(INSTALLED_BENCH) ## compare speed with torch and other packages
	$(BIN)/pytest bench $(BENCH)

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	$(BIN)/mypy

build: $(INSTALLED) ## compile what has changed, next to the Python files
	$(BIN)/python setup.py -q build_ext --inplace

clean: ## remove what the build made; .venv and runs stay
	rm -rf build dist *.egg-info trm_fast/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is named in every install, so that pip never replaces it. The Triton tests need no GPU, but
# only a CUDA torch brings Triton. The switches are off because `build` does the compiling.
$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	rm -f $(VENV)/installed-*
	$(PIP_INSTALL) "setuptools>=77" ninja "pybind11>=2.13"
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP_INSTALL) "$(TRITON); sys_platform == 'linux'"
	TRM_FAST_CPU=0 TRM_FAST_CUDA=0 TRM_FAST_DATA=0 $(PIP_INSTALL) --no-build-isolation -e ".[dev,train,report,data,track]"
	touch $@

$(INSTALLED_BENCH): $(INSTALLED)
	TRM_FAST_CPU=0 TRM_FAST_CUDA=0 TRM_FAST_DATA=0 $(PIP_INSTALL) --no-build-isolation -e ".[bench]"
	touch $@
