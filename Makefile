# make demo | results-small | test | lint | bench | docs | site: each sets up what it needs in .venv, from nothing but this checkout.
# What is removed and made anew lies in this checkout, whatever the command line says and wherever make is called from.
ifneq ($(realpath $(CURDIR)),$(realpath $(dir $(firstword $(MAKEFILE_LIST)))))
$(error make works in the folder of its Makefile: make -C $(dir $(firstword $(MAKEFILE_LIST))))
endif
PYTHON ?= python3
override VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help demo results-small test test-slow sanitize cuda-check explorer-check lint bench bench-gpu docs site site-check federated-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train six small models on recall and needles, test them to 16,384 tokens: runs/demo/report (8 minutes on two cores)"
	@echo "make results-small  the small version of every page of docs/results: runs/results/small"
	@echo "make test       the test suite"
	@echo "make test-slow  the tests that build the package or take long"
	@echo "make sanitize   the compiled kernels under the address and undefined behaviour sanitizers (a minute)"
	@echo "make cuda-check the CUDA kernels by nvcc for three generations of GPUs, where nvcc is here"
	@echo "make explorer-check  the explorer of reports in a headless browser, where Chromium is here"
	@echo "make lint       ruff and pyright"
	@echo "make bench      time the kernels of this machine: runs/bench"
	@echo "make bench-gpu  check the kernels on this machine's GPU, then time them: docs/results/gpu"
	@echo "make docs       renew the generated parts of README.md and docs"
	@echo "make site       build the site from docs and the library: build/site/html, to be opened from there (a minute)"
	@echo "make site-check the site in a headless browser, where Chromium is here"
	@echo "make federated-check  examples/federated with Flower, in an environment of its own"
	@echo "make clean      remove the virtual environment and the build, not the runs"
	@echo "PYTHON=python3.12 names the Python, 3.11 to 3.13, that the virtual environment is made with"

# Editable, so that the experiments run from the checkout; built again when the sources of the compiled library change.
# pip reads the constraints for the build's own requirements from the environment only. The CUDA kernels are built on
# request; without a GPU they are compiled by cuda-check alone.
CUDA_TARGETS := $(if $(wildcard /dev/nvidia0),--config-settings=cmake.define.SEQARCH_CUDA=ON)
$(INSTALLED): pyproject.toml build_backend.py constraints.txt CMakeLists.txt $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "seqarch needs Python 3.11 to 3.13, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
	       "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { echo "$(VENV) is no virtual environment: move it away" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $(CUDA_TARGETS) --editable '.[experiments,export,baselines,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m experiments.demo

results-small: $(INSTALLED)
	$(BIN)/python -m experiments.study --all --version small

# One thread a worker: two workers with two threads each are slower than either alone. Each begins with its half of the
# tests, in their order, so that what the tests of a file share is made once, and takes from the other's what is left.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal

# Each element that a kernel must write is looked at, too; no Python takes part.
SANITIZED := build/sanitize/kernels
SANITIZED_PARTS := $(patsubst csrc/%.cpp,build/sanitize/csrc/%.o,$(wildcard csrc/cpu/*.cpp)) \
  $(patsubst tests/%.cpp,build/sanitize/tests/%.o,$(wildcard tests/sanitize/*.cpp))
CHECKED := -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc/include -Itests/sanitize
build/sanitize/%.o: %.cpp $(wildcard csrc/include/*.h csrc/cpu/*.h tests/sanitize/*.h)
	@mkdir -p $(@D)
	$(CXX) $(CHECKED) -fopenmp -c $< -o $@

$(SANITIZED): $(SANITIZED_PARTS)
	$(CXX) $(CHECKED) -fopenmp $^ -o $@

# The CUDA kernels, compiled for this processor with a stand-in for CUDA, against those of the CPU.
EMULATED := build/emulation/kernels
EMULATED_PARTS := $(patsubst csrc/cuda/%.cu,build/emulation/%.o,$(wildcard csrc/cuda/*.cu))
build/emulation/%.o: csrc/cuda/%.cu $(wildcard csrc/include/*.h csrc/cuda/*.cuh tests/emulation/*.h)
	@mkdir -p $(@D)
	$(CXX) $(CHECKED) -Wno-unknown-pragmas -Itests/emulation -x c++ -c $< -o $@

$(EMULATED): $(EMULATED_PARTS) $(wildcard csrc/cpu/* tests/emulation/* tests/sanitize/harness.h)
	$(CXX) $(CHECKED) -Itests/emulation $(wildcard csrc/cpu/causal_conv1d.cpp csrc/cpu/selective_scan*.cpp) \
	  $(filter %.o %.cpp,$(EMULATED_PARTS) $(wildcard tests/emulation/*.cpp)) -o $@

sanitize: $(SANITIZED) $(EMULATED)
	$(SANITIZED)
	$(EMULATED)

# csrc/cuda by nvcc for each compute capability, and what its kernels need of a GPU: no GPU is needed.
cuda-check: $(INSTALLED)
	$(BIN)/python -m tests.support.cuda_resources --check

# Filters, exports, keyboard, contrast and speed of the explorer; CHROMIUM names another browser than the one on PATH.
explorer-check: $(INSTALLED)
	$(BIN)/python -m pytest -m browser tests/browser

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(INSTALLED)
	$(BIN)/python -m experiments.bench

# With the Python of the machine, whose torch knows its GPU; the virtual environment here has a build for CPUs.
bench-gpu:
	$(PYTHON) -m experiments.bench --device cuda

docs: $(INSTALLED)
	$(BIN)/python -m docs.tables

# What builds the site is no part of what everybody installs.
$(VENV)/extra-site: $(VENV)/extra-%: pyproject.toml constraints.txt | $(INSTALLED)
	$(BIN)/python -m docs.site.requirements $* > $@.txt
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $@.txt
	@touch $@

site: $(INSTALLED) $(VENV)/extra-site
	rm -rf build/site
	$(BIN)/python -m docs.site

# Flower asks for other versions of some packages: an environment of its own has these, and all else of the one here.
FEDERATED := build/federated
$(FEDERATED)/installed: examples/federated/requirements.txt | $(INSTALLED)
	$(PYTHON) -m venv --clear $(FEDERATED)
	$(FEDERATED)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	$(BIN)/python -c 'from sysconfig import get_path as path; print(path("purelib"))' \
	  > $$($(FEDERATED)/bin/python -c 'from sysconfig import get_path as path; print(path("purelib"))')/beside.pth
	@touch $@

federated-check: $(FEDERATED)/installed
	$(BIN)/python -m pytest -q tests/check_federated.py

site-check: site
	$(BIN)/python -m pytest -q tests/browser/check_site.py

clean:
	rm -rf $(VENV) build
