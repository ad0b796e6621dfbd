# Everything from a fresh clone: needs python3 (3.11 or newer) with venv and headers, a C++17 compiler, and make.
#   make demo    set up, build, classify a photo and time it       make test       set up and run the tests
#   make bench   measure against other engines                     make test-all   the wider sweep too
#   make lint    formatters, linters, type checker                 make wheel      dist/
#   make flowers-model DATA=photos/    the classifier in the package, which is of 2,150 of the flower photos; without
#                                      DATA all 3,670 are fetched
#   make flowers-report DATA=photos/   docs/comparison, LeNet-5 and MobileNetV2 on the same photos

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Builds find the environment's own cmake and ninja first.
WITH_TOOLS := PATH="$(abspath $(VENV))/bin:$$PATH"
EDITABLE := $(WITH_TOOLS) $(PIP) install --no-build-isolation -c constraints.txt -e
PYTEST_ARGS ?=
DATA ?= flowers

# The package reads no folder that was not named to it: here one is, where it exists.
export MNV2_WEIGHTS ?= $(abspath $(wildcard ../shared/weights))

# What a build depends on. Python sources are used in place (editable install), so they are not among them.
INPUTS := constraints.txt pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
CPP_SOURCES := $(filter %.h %.cpp,$(INPUTS))

.DELETE_ON_ERROR:
.PHONY: help build demo test test-all test-triton-next bench bench-flowers flowers-model flowers-report lint format wheel clean

help:
	@sed -n '2,6s/^# *//p' Makefile

build: $(VENV)/.demo

demo: build
	@$(PY) -m mnv2_fast demo

test: $(VENV)/.dev
	$(PY) -m pytest -m "not slow" --durations=20 $(PYTEST_ARGS)

test-all: $(VENV)/.dev
	$(PY) -m pytest --durations=20 $(PYTEST_ARGS)

# The GPU kernels, interpreted and compiled for every GPU, by the Triton that newer builds of torch bring.
test-triton-next: $(VENV)/.dev
	$(PIP) install --quiet --upgrade --target $(VENV)/triton-next --no-deps triton==3.7.1
	PYTHONPATH=$(VENV)/triton-next $(PY) -m pytest tests/test_triton_depthwise.py tests/test_triton_operators.py \
	  tests/test_triton_builds.py tests/test_triton_traffic.py tests/test_triton_far.py tests/test_triton_network.py \
	  tests/test_gluon_block.py \
	  tests/test_triton_training.py tests/test_triton_train_builds.py tests/test_triton_train_modules.py \
	  tests/test_triton_train_declines.py tests/test_triton_train_ddp.py $(PYTEST_ARGS)

bench: $(VENV)/.bench
	$(PY) -m bench.kernels
	$(PY) -m bench.roofline
	$(PY) -m bench.peers
	$(PY) -m bench.photos
	$(PY) -m bench.training
	$(PY) -m bench.training --losses
	$(PY) -m bench.plot --readme

# An hour: whole trainings, ours and torch's. It needs photos, so `bench` is without it.
bench-flowers: $(VENV)/.bench
	$(PY) -m bench.flowers --data $(DATA)
	$(PY) -m bench.plot --readme

# More than an hour. One that was cut off goes on.
flowers-report: $(VENV)/.dev
	$(PY) -m mnv2_fast compare --data $(DATA) --epochs 16 --out runs/comparison --report docs/comparison

# About as long as the training takes, some minutes. One that was cut off goes on.
flowers-model: $(VENV)/.dev
	$(PY) tools/flowers_model.py --data $(DATA)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(PY) -m mypy

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

wheel: $(VENV)/.dev
	$(WITH_TOOLS) $(PY) -m build --no-isolation

clean:
	rm -rf $(VENV) build dist *.egg-info mnv2_fast/_C.*.so

# The stamp comes last: a half-made environment has none, and the next call mends it.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "mnv2: error: there is no $(PYTHON): 'sudo apt install python3-venv python3-dev'" >&2; exit 1; }
	@$(PYTHON) tools/preflight.py
	@$(PYTHON) -m venv $(VENV) || { echo "mnv2: error: no virtual environment could be made: 'sudo apt install python3-venv'" >&2; exit 1; }
	@touch $@

# The build requirements come first and the build runs without isolation: pinned, and installed once.
$(VENV)/.tools: $(VENV)/.made constraints.txt
	$(PIP) install -c constraints.txt setuptools cmake ninja pybind11
	@touch $@

$(VENV)/.demo: $(VENV)/.tools $(INPUTS)
	@$(PYTHON) tools/preflight.py python compiler
	$(EDITABLE) '.[demo]'
	@touch $@

# triton only where torch has not brought its own: a CUDA build of torch insists on its version.
$(VENV)/.dev: $(VENV)/.tools $(INPUTS)
	@$(PYTHON) tools/preflight.py python compiler
	$(EDITABLE) '.[dev]'
	@$(PY) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)' || $(PIP) install triton==3.6.0
	@touch $(VENV)/.demo $@

# The other engines and what quantizes for them: 1.5 GB and most of a minute that no test waits for.
$(VENV)/.bench: $(VENV)/.dev
	$(EDITABLE) '.[bench]'
	@touch $@
