# Each target sets up what it needs. Python 3.11 or later, pip and make are enough; uv is used if it is there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test coverage check docs integration chaos versions lint types clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed ## generate a small campaign against the sandbox into ./out
	@PREFECT_HOME=.prefect-demo $(BIN)/prefect-ttapi run flows/prompts.csv --sandbox --store ./out \
		--deliver ./out/delivered --key '{shot}/{name}-{index}.{ext}'

test: $(VENV)/.installed-dev ## the tests
	@echo "==> pytest"
	@$(BIN)/python -m pytest -n 3 --dist loadgroup -m "not integration"

coverage: $(VENV)/.installed-dev ## the tests again, with the lines that none of them runs: half as long again
	@echo "==> pytest --cov"
	@$(BIN)/python -m pytest -n 3 --dist loadgroup -m "not integration" --cov --cov-report=term

lint: $(VENV)/.installed-dev
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo

types: $(VENV)/.installed-dev
	@echo "==> mypy --strict"
	@$(BIN)/mypy
	@echo "==> types as users see them: basedpyright, and mypy without plugins"
	@$(BIN)/python tools/typecheck.py

docs: $(VENV)/.installed-docs ## the documentation site, into ./site; a link that leads nowhere is an error
	@echo "==> zensical build --strict"
	@$(BIN)/python -m zensical build --clean --strict

check: lint types docs test ## lint, types, documentation and tests

integration: $(VENV)/.installed-engines ## tests against real servers and a browser; installs what is missing of Debian's packages
	@tests/integration/install-packages
	@echo "==> pytest -m integration"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m integration
	@echo "==> the lowest versions of what we need"
	@$(BIN)/python tools/versions.py --quick lowest

chaos: $(VENV)/.installed-dev ## kill paying processes for up to an hour, and write into docs/figures.md what that cost
	@tests/integration/install-packages
	@$(BIN)/python benchmarks/chaos.py --write

versions: $(VENV)/.installed-dev ## demo, tests and schedule in an environment for each row of docs/versions.md (an hour)
	@$(BIN)/python tools/versions.py

clean: ## forget the virtual environment and what the demo made
	rm -rf $(VENV) .prefect-demo out site .cache

$(VENV)/bin/python:
	@echo "==> virtual environment in $(VENV)"
	@if command -v uv >/dev/null; then uv venv -q --python $(PYTHON) $(VENV); else $(PYTHON) -m venv $(VENV); fi

comma := ,

# -c holds exact versions; the stamp is renewed when they or the package's needs change
INSTALL = if command -v uv >/dev/null; then uv pip install -q --python $(BIN)/python -c constraints.txt -e $(1); \
	else $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e $(1); fi

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "==> installing prefect-ttapi and what it needs (a minute or two)"
	@$(call INSTALL,.)
	@touch $@

$(VENV)/.installed-engines: pyproject.toml constraints.txt | $(VENV)/.installed-dev
	@echo "==> installing Dask and Ray, for the integration tests"
	@$(call INSTALL,".[dev$(comma)engines]")
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "==> installing what builds the documentation"
	@$(call INSTALL,".[docs]")
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "==> installing prefect-ttapi and what its tests need (a minute or two)"
	@$(call INSTALL,".[dev]")
	@touch $@ $(VENV)/.installed
