# medsynth: every command of the README and of CI. `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := build/demo
WORKERS ?= 2

# nothing reaches out: no telemetry, no model downloads
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1

.PHONY: accountants bench-dp help demo test mutants slow realdata endtoend check format bench docs clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# a site of its own: phantoms of earlier demos are no patients of this one
demo: export MEDSYNTH_HOME := $(CURDIR)/$(DEMO)/site
demo: $(READY) ## a phantom hospital goes through all stages; ends with a summary
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/medsynth phantom --out $(DEMO)/hospital --patients 120 --seed 0
	$(BIN)/medsynth run configs/demo.yaml --input $(DEMO)/hospital --out $(DEMO)/run
	$(BIN)/medsynth verify $(DEMO)/run/release

test: $(READY) ## the fast tests, with coverage
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --cov --cov-report=term

mutants: $(READY) ## take each privacy guard out in turn: its tests must turn red
	$(BIN)/python tests/mutants/run.py --jobs $(WORKERS)

slow: $(READY) ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

realdata: $(READY) ## the tests on real cohorts (MEDSYNTH_DATA, or ../shared/data)
	$(BIN)/python -m pytest -q -m realdata

endtoend: $(READY) ## the whole pipeline on small phantom cohorts
	$(BIN)/python -m pytest -q -m endtoend

check: $(READY) ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-dp ## the same as bench-dp

bench-dp: $(READY) ## time, memory and correctness of private steps against a plain one
	$(BIN)/python -m pipelines.bench

accountants: $(READY) ## epsilon by four accountants over a grid of settings, as a table
	$(BIN)/python docs/write_accountants.py

docs: $(READY) ## build the documentation into build/site
	$(BIN)/python docs/write_config_reference.py > docs/reference/config.md
	$(BIN)/mkdocs build --strict --quiet

clean: ## remove everything that make wrote
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
