# make serve: everything set up by itself in .venv, then a server. make test: the same, then the C++ tests and the Python
# tests. `make help` lists the rest.
# Needs python >= 3.11, a C++20 compiler and make; cmake, ninja and the Python packages come from PyPI.

PYTHON ?= python3
VENV   ?= .venv
BUILD  ?= build-make
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
# The version the tests' tolerances were seen with; the CPU build, because the tests need no GPU.
TORCH  ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# ON in CI; a newer compiler's new warnings are no reason to fail somebody's `make test`.
WERROR ?= OFF
CTEST_ARGS  ?= --output-on-failure
PYTEST_ARGS ?=
# What `make serve` serves (default: the bundled model), and further flags for it: make serve ARGS="--port 8000"
MODEL ?=
ARGS  ?=

BIN   := $(abspath $(VENV))/bin
PY    := $(BIN)/python
TOOLS := $(abspath $(VENV))/.stamp-tools
DEPS  := $(abspath $(VENV))/.stamp-deps
TREE  := $(BUILD)/build.ninja
READY := $(abspath $(VENV))/.stamp-serve
SOURCES := $(shell find python cpp cuda -name __pycache__ -prune -o -type f ! -name '*.so' ! -path '*.egg-info*' -print)
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "$(PYTHON) is missing or older than Python 3.11; name a newer one: make serve PYTHON=python3.12"; exit 1; }
# The tools' own folder first: cmake and ninja may exist nowhere else.
export PATH := $(BIN):$(PATH)

.PHONY: help serve test ctest pytest build lint clean gtest
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/  \1\t/p' Makefile

serve: $(READY)  ## set up what is missing, then serve a model on 127.0.0.1:30000
	@exec $(BIN)/sapwood serve $(MODEL) $(ARGS)

test: ctest pytest  ## set up what is missing, build, run ctest and pytest

ctest: build
	$(BIN)/ctest --test-dir $(BUILD) $(CTEST_ARGS)

pytest: ctest
	$(PY) -m pytest $(PYTEST_ARGS)

build: $(DEPS)  ## the C++ tests, and sapwood._core into python/sapwood (editable install)
	$(BIN)/cmake --build $(BUILD) --parallel $(JOBS)

# An environment that `make test` has set up runs from the checkout already; a new one gets what serving needs, no more,
# and of the CPU kernels those of this machine.
$(READY): pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	@$(CHECK_PYTHON)
	@[ -x $(PY) ] || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@if [ -e $(DEPS) ]; then $(MAKE) build; else \
	  echo "installing into $(VENV): downloads about 65 MB, compiles for a minute or two"; \
	  SAPWOOD_CPU_LEVELS=native $(PY) -m pip install -q --disable-pip-version-check --no-compile . ; fi
	@touch $@

lint: $(DEPS)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove what building made; .venv stays
	rm -rf $(BUILD) build build-pip build-asan build-tsan build-release build-cuda build-cutlass dist
	rm -rf python/*.egg-info python/sapwood/_core*.so python/sapwood/libsapwood_cuda.so $(DEPS) $(READY)

gtest:
	@if ! ls /usr/include/gtest/gtest.h /usr/local/include/gtest/gtest.h $(BIN)/../include/gtest/gtest.h >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "GoogleTest is missing: apt-get install libgtest-dev"; \
	    { apt-get install -y -q libgtest-dev || { apt-get update -q && apt-get install -y -q libgtest-dev; }; }; \
	  else \
	    echo "GoogleTest is not in the usual places; if CMake does not find it either, install it (Debian: sudo apt-get install libgtest-dev)"; \
	  fi; \
	fi

$(TOOLS):
	@$(CHECK_PYTHON)
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "pip>=23" "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.22" ninja
	touch $@

$(TREE): | $(TOOLS) gtest
	$(BIN)/cmake -S . -B $(BUILD) -G Ninja -DSAPWOOD_TESTS=ON -DSAPWOOD_PYTHON=ON -DSAPWOOD_CUDA=OFF -DSAPWOOD_WERROR=$(WERROR) \
	  -DPython_EXECUTABLE=$(PY) -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja

# torch first, from wherever pip is told to look, else from PyTorch's CPU index: PyPI's own wheel brings gigabytes of CUDA.
# The editable install compiles in the tree that the C++ tests use.
$(DEPS): pyproject.toml setup.py | $(TREE) $(TOOLS)
	$(PY) -c 'import torch, sys; sys.exit(torch.__version__.split("+")[0] != "$(TORCH)")' 2>/dev/null || \
	  $(PY) -m pip install -q "torch==$(TORCH)+cpu" || \
	  $(PY) -m pip install -q --extra-index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu" || \
	  $(PY) -m pip install -q "torch==$(TORCH)"
	SAPWOOD_BUILD_DIR=$(abspath $(BUILD)) SAPWOOD_BUILD_JOBS=$(JOBS) $(PY) -m pip install -q --no-build-isolation -e '.[test]'
	touch $@
