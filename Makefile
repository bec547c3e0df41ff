# make help lists what a person types. Every target first makes .venv if it is missing or older than
# pyproject.toml or constraints.txt: with uv where it is installed, else with venv and pip.

# The interpreter that .venv is made from:  make demo PYTHON=python3.12
PYTHON ?= python3
# Which faiss, cpu or gpu:  make demo FAISS=gpu  (remembered by the stamp, so that the next plain `make` keeps it)
FAISS ?= $(if $(wildcard .venv/.stamp-gpu),gpu,cpu)
# Passed on to pytest or the workflow:  make test ARGS="-k density"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.stamp-$(FAISS)
OTHER_FAISS := $(if $(filter gpu,$(FAISS)),cpu,gpu)
# a uv that is only a version manager's shim does not answer
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv)
# the folders that hold Python
SOURCES := $(patsubst %/,%,$(sort $(dir $(wildcard $(addsuffix /*.py,pd_core workflows demo benchmarks chaos tests infra infra/mlflow)))))

ifeq ($(filter $(FAISS),cpu gpu),)
$(error FAISS=$(FAISS): it must be cpu or gpu)
endif

.PHONY: help env demo test test-slow check bench chaos lock clean
.DEFAULT_GOAL := help

help:
	@echo 'make env        .venv with the versions of constraints.txt, which every other target makes too if it is missing'
	@echo 'make demo       demo images, build_index on them, a small generator, two datasets by density, a trade-off curve, a fine-tuned generator; prints where the reports are'
	@echo 'make test       the tests that take seconds              ARGS="-k density" goes to pytest'
	@echo 'make test-slow  the tests that take longer than 20 s each'
	@echo 'make check      ruff (lint, format), mypy, import directions'
	@echo 'make bench      the benchmarks; writes docs/benchmarks.md'
	@echo 'make chaos      kills workflows in every way at random moments and compares; writes docs/reliability.md'
	@echo 'make lock       constraints.txt and what images install (needs uv; LOCK_FLAGS=--upgrade: the newest)'
	@echo 'make clean      remove .venv and caches; what runs wrote (runs/) stays'
	@echo 'FAISS=cpu|gpu chooses the faiss package, PYTHON=... the interpreter (3.11 or newer); now $(FAISS), $(PYTHON)'

env: $(STAMP)

demo: $(STAMP)
	$(PY) demo/make_digits.py --output runs/demo-data
	$(PY) workflows/build_index.py --config workflows/configs/default.yaml
	$(PY) demo/train_ddpm.py --data runs/demo-data/digits --output runs/generators/ddpm
	$(PY) workflows/generate.py --config workflows/configs/demo-typical.yaml
	$(PY) workflows/generate.py --config workflows/configs/demo-varied.yaml
	$(PY) demo/compare.py runs/digits runs/digits-typical runs/digits-varied --output runs/demo.html
	$(PY) workflows/tradeoff.py --config workflows/configs/demo-tradeoff.yaml
	$(PY) workflows/finetune.py --config workflows/configs/demo-finetune.yaml

test: $(STAMP)
	$(PY) -m pytest -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(PY) -m pytest -m slow $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports

bench: $(STAMP)
	$(PY) benchmarks/run.py $(ARGS)

# The stamp is written last: an install that broke off is done again. The two faiss packages write into the same
# folder, so the one that is not wanted goes before the other comes.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) && $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'pd_core needs Python 3.11 or newer; "$(PYTHON)" is not. Name one: make $(MAKECMDGOALS) PYTHON=python3.11' >&2; \
	    exit 1; }; \
	  rm -rf $(VENV) && \
	  if test -n '$(UV)'; then '$(UV)' venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV); \
	  else $(PYTHON) -m venv $(VENV); fi; }
	@rm -f $(VENV)/.stamp-*
	@echo 'installing the versions of constraints.txt into $(VENV) (6 GB with torch and its CUDA libraries; minutes the first time)'
ifneq ($(UV),)
	'$(UV)' pip uninstall --quiet --python $(PY) faiss-$(OTHER_FAISS)
	'$(UV)' pip install --compile-bytecode --python $(PY) --editable '.[$(FAISS),demo,dev]' --constraint constraints.txt
else
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip uninstall --quiet --yes faiss-$(OTHER_FAISS)
	$(PY) -m pip install --quiet --editable '.[$(FAISS),demo,dev]' --constraint constraints.txt
endif
	@touch $@

chaos: $(STAMP)
	$(PY) chaos/run.py $(ARGS)

# For the platform that the tests run on; elsewhere a pin holds for the packages that exist there. No index address is written down.
# Images install what is listed with its hashes and nothing else: requirements.txt, and of each variant what it adds.
# hatchling and editables build our own package there, offline.
COMPILE = '$(UV)' pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --no-annotate --no-emit-index-url --no-emit-find-links
HASHED = $(COMPILE) --constraint constraints.txt --generate-hashes --no-header
WRITTEN = echo '\# Written by `make lock`.'
ADDED = grep -vxFf infra/container/requirements.txt
lock:
	@test -n '$(UV)' || { echo 'make lock needs uv (pip install uv)' >&2; exit 1; }
	$(COMPILE) pyproject.toml --extra cpu --extra demo --extra dev --output-file constraints.txt \
	  --custom-compile-command 'make lock' $(LOCK_FLAGS)
	{ $(WRITTEN); printf '%s\n' hatchling editables | $(HASHED) pyproject.toml - --extra diffusers; } \
	  > infra/container/requirements.txt
	{ $(WRITTEN); $(HASHED) pyproject.toml --extra cpu | $(ADDED); } > infra/container/faiss-cpu.txt
	{ $(WRITTEN); $(HASHED) pyproject.toml --extra gpu | $(ADDED); } > infra/container/faiss-gpu.txt
	{ $(WRITTEN); echo boto3 | $(HASHED) - | $(ADDED); } > infra/container/cloud-aws.txt
	{ $(WRITTEN); echo google-api-python-client | $(HASHED) - | $(ADDED); } > infra/container/cloud-gcp.txt
	{ $(WRITTEN); printf '%s\n' 'mlflow[auth]' psycopg2-binary boto3 | $(HASHED) -; } > infra/mlflow/requirements.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
