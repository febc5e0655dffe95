# Needs Python >= 3.11 and make. Every target does its own set-up, once, in .venv.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install demo test browser slow lint check format clean

help:
	@echo 'make demo     train, index, ask, and write stores/demo/report.html (under two minutes)'
	@echo 'make test     the default test suite'
	@echo 'make browser  the tests in a real browser; as root on Debian, Chromium is installed'
	@echo 'make slow     the long tests: kills at random moments, fetched data'
	@echo 'make lint     format, lint and types'
	@echo 'make check    what CI runs: lint, test, browser'
	@echo 'make format   rewrite the sources in the project format'
	@echo 'make install  only the set-up: .venv with the pinned dependencies'
	@echo 'make clean    remove .venv and the caches'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'setting up $(VENV), once (about two minutes)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/tda demo

test: $(INSTALLED)
	$(PYTEST) -n 2

browser: $(INSTALLED)
	@chromium=$$(.ci/chromium) && CHROMIUM="$$chromium" $(PYTEST) -n 2 -m browser

slow: $(INSTALLED)
	$(PYTEST) -n 2 -m "slow or realdata"

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test browser

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
