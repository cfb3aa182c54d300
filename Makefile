# A fresh machine needs Python >= 3.11 and make; everything else is set up in
# .venv and .cache of this folder.
#
#   make demo    train the default config (about 12 minutes on 2 cores)
#   make test    the tests
#   make check   lint, format and types
#   make clean   remove .venv and .cache (runs/ stays)

SHELL := /bin/bash
VENV := .venv
export FUSIONLAB_CACHE ?= $(CURDIR)/.cache
# Compiled modules are kept, whatever the environment says: without them every
# start compiles JAX's Python anew. Those that are used, when they first are.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check \
  --no-compile
# Arguments for pytest, e.g. make test ARGS="-k config".
ARGS ?=

# The first Python that is new enough; PYTHON=/path/to/python overrides.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$p && break; done)

.PHONY: demo test check clean

# Huge pages spare the CPU a tenth of its time: XLA's temporaries are new memory
# in every step. Other C libraries ignore the variable.
demo: $(VENV)/.demo
	@run=runs/demo; n=1; \
	while grep -qs '"status": *"finished"' $$run/status.json; do \
	  n=$$((n + 1)); run=runs/demo-$$n; done; \
	echo "training into $$run"; \
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(VENV)/bin/python -m experiments.run \
	  --config=configs/mot_chameleon.py --workdir=$$run

# More workers than two cores: some tests wait for processes that they started.
test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
	  $(ARGS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright

clean:
	rm -rf $(VENV) .venv-3.12 .venv-tpu .cache

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "error: no Python >= 3.11 found; install one, or name it:" \
	    "make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make a virtual environment; on Debian and" \
	    "Ubuntu: apt install python3-venv" >&2; exit 1; }

# Installed again when the requirements change.
$(VENV)/.demo: setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), about a minute"
	@$(PIP) -e '.[data]'
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), about a minute"
	@$(PIP) -e '.[data,dev]'
	@touch $@ $(VENV)/.demo
