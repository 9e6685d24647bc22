# Two commands: `make demo` sets everything up and runs the main job, `make test` sets everything up and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check bench clean

demo: $(VENV)/.demo
	$(BIN)/numfit demo

test: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

check: $(VENV)/.test
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy src/numfit
	$(BIN)/lint-imports

bench: $(VENV)/.test
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/fit.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: with it installed at its pinned version, nothing later replaces it by a larger build
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
