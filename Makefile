# `make demo` and `make test` work from nothing: each builds .venv when it is missing or its pins have changed.

VENV    := .venv
BIN     := $(VENV)/bin
ORACLES := .venv-oracles
WORKERS ?= 2

# The first Python on the path that is new enough, unless PYTHON names one.
AT_LEAST_311 := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11; do \
	$$p $(AT_LEAST_311) 2>/dev/null && echo $$p && break; done)

# PyTorch's own index has a CPU build of 200 MB; on Linux the ordinary index has one with several GB of CUDA.
TORCH_CPU := https://download.pytorch.org/whl/cpu

# Where there is a compiler the kernels must build; without one unweave installs without them.
ifneq ($(shell command -v $(CXX) 2>/dev/null),)
export CXX
export UNWEAVE_REQUIRE_KERNELS := 1
endif
KERNELS := CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test slow sanitize oracles docs wheel clean

demo: $(VENV)/.run
	$(BIN)/unweave demo --overwrite

test: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

slow: $(VENV)/.dev  # what takes minutes
	$(BIN)/pytest -m slow

sanitize: $(VENV)/.dev  # the kernel tests with AddressSanitizer and UBSan
	PYTHON=$(BIN)/python scripts/sanitize.sh

oracles: $(ORACLES)/.run  # other libraries read our files and agree with our numbers; Triton interprets the CUDA kernels
	$(ORACLES)/bin/pytest -m oracle tests/oracles
	$(ORACLES)/bin/pytest tests/kernels/test_triton.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@! command -v chromium >/dev/null || $(BIN)/python scripts/check_site.py

wheel: $(VENV)/.dev  # dist/: the source archive, and the wheel built from it
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	@size=$$(cat dist/*.whl | wc -c); echo "The wheel has $$size bytes."; test $$size -le 15000000

clean:
	rm -rf $(VENV) $(ORACLES) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Stamps: .torch = an environment with PyTorch in it, .run = unweave too, .dev and .docs = those extras too.

%/.torch:
	@$(or $(PYTHON),false) $(AT_LEAST_311) 2>/dev/null || { \
	  echo "unweave needs Python 3.11 or newer. Name one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing PyTorch and the rest into $* (once, a few minutes) ..."
	$(PYTHON) -m venv $*
	@if ! command -v nvidia-smi >/dev/null \
	    && $*/bin/python -c "import urllib.request as u; u.urlopen('$(TORCH_CPU)/torch/', timeout=4)" 2>/dev/null; \
	  then extra="--extra-index-url $(TORCH_CPU)"; fi; \
	  $*/bin/pip install --quiet --constraint constraints.txt $$extra torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml constraints.txt $(KERNELS)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

$(ORACLES)/.run: $(ORACLES)/.torch pyproject.toml constraints.txt $(KERNELS) tests/oracles/requirements.txt \
    benchmarks/requirements.txt
	$(ORACLES)/bin/pip install --quiet --constraint constraints.txt -r tests/oracles/requirements.txt --editable .
	$(ORACLES)/bin/pip install --quiet --no-deps -r benchmarks/requirements.txt
	@touch $@
