# `make run` trains and evaluates SDPO-LLM on MovieLens-100K; `make test` runs the tests. Both set up .venv first.
VENV ?= .venv
# CONSTRAINTS=/dev/null installs the newest of everything.
CONSTRAINTS ?= constraints.txt
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10 || command -v python3)
RUN = $(VENV)/bin/python
READY = $(VENV)/.ready

PRETRAINED = A pretrained model (SmolLM2-135M, configs/ml-100k/titles.yaml) had HR@1 0.4708 on ml-100k after 32 minutes on two cores with AMX.

.PHONY: run test faults lint docs dist clean

run: $(READY)
	$(RUN) run_recbole_sdpo.py --model=SDPO-LLM --dataset=ml-100k $(ARGS)
	@echo "$(PRETRAINED)"

test: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

faults: $(READY)
	$(RUN) -m tests.faults $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

dist: $(READY)
	rm -rf dist
	$(RUN) -m pip install --quiet --constraint constraints.txt build twine
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*

# setuptools warns whoever installs a checkout of folders that have the package's name.
$(READY): export PYTHONWARNINGS = ignore:Editable installation

# A Python that somebody asks for is the one of the environment, or nothing is done.
ifneq ($(filter command environment,$(firstword $(origin PYTHON))),)
.PHONY: same-python
same-python:
	@test ! -x $(RUN) || { there=$$($(RUN) -V) && asked=$$($(PYTHON) -V) || exit 1; \
	test "$$there" = "$$asked" || { echo "$(VENV) has $$there, and PYTHON=$(PYTHON) is $$asked: remove $(VENV), or name another folder by VENV." >&2; exit 1; }; }
$(READY): | same-python
endif

# RecBole alone comes first: from Python 3.12 on what it asks for cannot be installed (docs/versions.md).
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit("recbole-sdpo is tested on Python 3.10 to 3.13, and this is %d.%d; give another, as in make PYTHON=python3.12." % v)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade --constraint $(CONSTRAINTS) pip setuptools wheel
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --no-deps recbole==1.2.1
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
