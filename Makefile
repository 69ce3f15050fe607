# Every chore of the project. `make` alone lists them.

VENV        := .venv
BIN         := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
# Installed first and alone. On Linux the newest torch brings gigabytes of GPU packages; where an index with
# CPU builds is at hand, name it: make setup PIP_ARGS='--extra-index-url URL' TORCH='torch==2.13.0+cpu'
TORCH       ?= torch==2.13.0
PIP_ARGS    ?=
PIP         := $(BIN)/python -m pip -qq --disable-pip-version-check install $(PIP_ARGS)
# Which Python makes the environment: `make setup PYTHON=/path/to/python`; empty means search.
PYTHON      ?=
PYTHONS     := $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)
# More arguments for pytest, rewire demo and the benchmarks.
PYTEST_ARGS ?=
DEMO_ARGS   ?= all
BENCH_ARGS  ?=
# Processes side by side in `make sweep`.
JOBS        ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test sweep lint format bench docs clean

# Nothing here may wait for a model hub: all weights come from packages or are made on the spot.
demo test sweep bench: export HF_HUB_OFFLINE := 1
# Threads that wait for work must not keep the cores from others (benchmarks have the machine to themselves).
demo test sweep: export OMP_WAIT_POLICY := PASSIVE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.setup ## make or update .venv with everything that demo, test and lint need
	@:

demo: setup ## run the demonstrations on a real model (DEMO_ARGS=all)
	@$(BIN)/rewire demo $(DEMO_ARGS)

test: setup ## run the tests (PYTEST_ARGS='-k name')
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

sweep: setup ## prove every edit on every model type, write docs/coverage.md, and run the long tests
	@$(BIN)/rewire coverage --jobs $(JOBS) --markdown docs/coverage.md
	@$(BIN)/python -m pytest -q -m sweep $(PYTEST_ARGS)

lint: setup ## check style, formatting and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted; run 'make format'." >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary

format: setup ## put style and formatting right where a tool can
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

bench: setup ## measure, each case against the untouched model (BENCH_ARGS=...)
	@$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

docs: $(VENV)/.docs ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove build output and tool caches (.venv stays)
	@rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name .git -prune -o -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The stamps are as old as the files that say what to install. An environment that stands is brought up to
# date in place; one whose Python is gone or too old is made anew.
$(VENV)/.setup: pyproject.toml hatch_build.py $(wildcard src/rewire/native/*.h src/rewire/native/*.cpp) $(CONSTRAINTS)
	@$(call is_usable,$(BIN)/python) || { $(find_python); echo "making $(VENV) with $$python"; \
	  "$$python" -m venv --clear $(VENV); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@echo "installing into $(VENV) (minutes the first time)"
	@$(PIP) '$(TORCH)'
	@$(PIP) -c $(CONSTRAINTS) -e '.[demo,test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.setup
	@$(PIP) -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

# Is $(1) a Python of at least 3.11 that can make environments (Debian keeps venv in a package of its own)?
is_usable = "$(1)" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1

# Shell code that sets $$python to the first usable one of PYTHONS, or stops.
define find_python
python=; \
for candidate in $(PYTHONS); do \
  if $(call is_usable,$$candidate); then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "No Python >= 3.11 with its venv module among: $(PYTHONS)." >&2; \
  echo "Install one (on Debian and Ubuntu also its -venv package), or name it: make setup PYTHON=/path/to/python" >&2; \
  exit 1; \
fi
endef
