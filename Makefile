# `make demo` and `make test` work in a fresh clone: they create .venv, install torch, build and run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
# 1: the packages of requirements/dev.txt, each file known by its hash; 0: what pyproject.toml allows.
# torch is TORCH in both: CPU, CUDA and other builds of it are other files, with needs of their own.
LOCKED ?= 1
ifeq ($(filter 0 1,$(LOCKED)),)
$(error LOCKED must be 0 or 1; got '$(LOCKED)')
endif
# Backends that must be usable: the tests fail, rather than skip, without them.
export TRM_FAST_EXPECT ?= cpp,triton

VENV ?= .venv
BIN := $(VENV)/bin
# One stamp per torch, so that another TORCH is installed when it is asked for.
INSTALLED := $(VENV)/installed-$(LOCKED)-$(shell echo '$(TORCH)' | tr -c 'A-Za-z0-9.=+\n' _)
# pip-audit has packages of its own, which nothing else should see.
AUDITOR := $(VENV)-audit
EXTRAS := dev train report data track bench
BRINGS_TRITON := "from importlib.metadata import requires; \
	exit(not any('triton' in each for each in requires('torch')))"
PIP := pip install --disable-pip-version-check
# A source distribution would run code of its own, with build packages that no hash is known of.
PIP_LOCKED := $(PIP) --require-hashes --no-deps --only-binary :all:
PIP_TORCH := $(BIN)/$(PIP) "$(TORCH)" $(MORE)
# So that nothing else comes in than what is locked.
NO_DEPS := $(if $(filter 1,$(LOCKED)),--no-deps)
LOCK := uv pip compile -q --universal --python-version 3.10 --upgrade --generate-hashes \
	--no-annotate --custom-compile-command "make lock"
CSRC := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.cuh)

# The compile step finds ninja there.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test quick test-long sanitize test-oldest test-newest install-oldest install-newest
.PHONY: installed on-another bench lint build lock audit clean
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/\1 \2/p' Makefile | while read name text; do \
		printf '%-14s %s\n' "$$name" "$$text"; done

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

sanitize: build ## run native code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	$(BIN)/python -m tests.sanitize

# The oldest torch of pyproject.toml and the newest that was tried, each with its own Triton; the
# interpreter of the old one takes no later NumPy. One build of the libraries serves every torch.
OLDEST := VENV=.venv-oldest TORCH=torch==2.11.0 TRITON=triton==3.6.0 MORE='"numpy<2.3"'
NEWEST := VENV=.venv-newest TORCH=torch==2.14.1 TRITON=triton==3.8.0
test-oldest: build ## run what compiles, and one case of each other test, on the oldest torch
	$(MAKE) $(OLDEST) on-another

test-newest: build ## the same on the newest torch
	$(MAKE) $(NEWEST) on-another

install-oldest: ## install the oldest torch: several GB where there are CUDA builds of it alone
	$(MAKE) $(OLDEST) installed

install-newest: ## install the newest torch, likewise
	$(MAKE) $(NEWEST) installed

installed: $(INSTALLED)

on-another: $(INSTALLED)
	$(PYTEST) -m "compile and not long"
	$(PYTEST) --quick

# Options of pytest and pytest-benchmark, such as BENCH="-k muon --benchmark-json=muon.json".
bench: build ## compare speed with torch and other packages
	$(BIN)/pytest bench $(BENCH)

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	$(BIN)/mypy

build: $(INSTALLED) ## compile what has changed, next to the Python files
	$(BIN)/python setup.py -q build_ext --inplace

# torch is taken for something that no Python needs; what it asks for is named in dev.in.
lock: ## resolve requirements/*.txt anew, for every Python and system; needs uv
	mkdir -p build
	echo 'torch ; python_version < "3"' > build/no_torch.txt
	echo '$(TRITON)' > build/triton.txt
	$(LOCK) --override build/no_torch.txt -c build/triton.txt $(EXTRAS:%=--extra %) \
		-o requirements/dev.txt pyproject.toml requirements/dev.in
	$(LOCK) -c requirements/dev.txt -o requirements/audit.txt requirements/audit.in

# Options of pip-audit, such as AUDIT="--ignore-vuln ID" for what does not concern the project.
audit: $(INSTALLED) $(AUDITOR)/installed ## look known vulnerabilities of the packages up
	$(BIN)/python .ci/audit.py $(AUDITOR)/bin/pip-audit $(AUDIT)

clean: ## remove what the build made; .venv and runs stay
	rm -rf build dist *.egg-info trm_fast/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is named in every install, so that pip never replaces it. The Triton tests need no GPU, but
# only a CUDA torch brings Triton. The switches are off because `build` does the compiling.
$(INSTALLED): pyproject.toml requirements/dev.txt | $(VENV)/bin/python
	rm -f $(VENV)/installed-*
ifeq ($(LOCKED),1)
	$(BIN)/$(PIP_LOCKED) -r requirements/dev.txt
endif
	$(PIP_TORCH) "setuptools>=77" ninja "pybind11>=2.13"
	$(BIN)/python -c $(BRINGS_TRITON) || $(PIP_TORCH) "$(TRITON); sys_platform == 'linux'"
	TRM_FAST_CPU=0 TRM_FAST_CUDA=0 TRM_FAST_DATA=0 $(PIP_TORCH) $(NO_DEPS) --no-build-isolation \
		-e ".[$(shell echo $(EXTRAS) | tr ' ' ,)]"
	touch $@

$(AUDITOR)/installed: requirements/audit.txt
	$(PYTHON) -m venv $(AUDITOR)
	$(AUDITOR)/bin/$(PIP_LOCKED) -r requirements/audit.txt
	touch $@
