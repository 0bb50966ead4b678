PYTHON ?= python3
VENV ?= .venv
# What `pip install` is told for PyTorch. Any release from 2.9 on works: make demo TORCH=torch, or
# TORCH="torch --index-url ..." for the build of your hardware.
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/

.PHONY: demo test test-all check docs install

demo: install
	$(RUN)python scripts/demo.py

test: install
	OMP_NUM_THREADS=1 $(RUN)python -m pytest

test-all: install
	OMP_NUM_THREADS=1 $(RUN)python -m pytest -m "" --hypothesis-profile thorough

check: install
	$(RUN)pip install --quiet -e ".[dev]"
	$(RUN)ruff format --check
	$(RUN)ruff check
	$(RUN)mypy

docs: install
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(RUN)python -m mkdocs build
	@echo "open build/site/index.html"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankwise needs Python 3.11 or later; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -c 'import torch' 2>/dev/null || $(RUN)pip install --quiet $(TORCH)
	$(RUN)pip install --quiet -e ".[test]"
	@touch $@
