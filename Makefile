# `make run` trains and evaluates SDPO-LLM on MovieLens-100K; `make test` runs the tests. Both set up .venv first.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10 || command -v python3)
RUN = $(VENV)/bin/python
READY = $(VENV)/.ready

.PHONY: run test faults lint dist clean

run: $(READY)
	$(RUN) run_recbole_sdpo.py --model=SDPO-LLM --dataset=ml-100k $(ARGS)

test: $(READY)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -q $(ARGS)

faults: $(READY)
	$(RUN) -m tests.faults $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .

dist: $(READY)
	rm -rf dist
	$(RUN) -m pip install --quiet --constraint constraints.txt build twine
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*

# setuptools warns whoever installs a checkout of folders that have the package's name.
$(READY): export PYTHONWARNINGS = ignore:Editable installation

$(READY): setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit("recbole-sdpo is tested on Python 3.10 to 3.13, and this is %d.%d; give another, as in make PYTHON=python3.12." % v)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-deps recbole
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
