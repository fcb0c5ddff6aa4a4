# Everything a user or a maintainer does, by name. `make run` and `make test` set up what they need.
VENV     := .venv
BIN      := $(VENV)/bin
PYTHON   ?= python3.11
ARGS     ?=
TESTS    ?= tests
LANES    ?= 2
PACKAGES := $(VENV)/.packages
JAVA     := $(VENV)/.java

.PHONY: install run test lint types bench chaos settings browser clean help

help:            ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(PACKAGES) $(JAVA) ## Install into .venv and resolve the Java archives

$(PACKAGES): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is missing: install it, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV) (the first time takes some minutes)"
	@quiet=; [ -t 1 ] || quiet=--quiet; $(BIN)/pip install $$quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(JAVA): $(PACKAGES) $(wildcard spark_compat/class_lists/*)
	@echo "getting Java archives (the first time from Maven)"
	$(BIN)/python -m spark_compat
	@touch $@

run: install      ## Start the whole pipeline: make run ARGS="--rate 500 --duration 60"
	@exec $(BIN)/ray-pipeline run $(ARGS)

test: install browser ## Pass every test (TESTS=tests/unit for a part, LANES=0 one after another)
	$(BIN)/python -m pytest --numprocesses $(LANES) --dist loadscope $(TESTS) $(ARGS)

browser:
	@command -v chromium >/dev/null || { \
	  echo "installing Debian's chromium for the browser tests"; \
	  if [ "$$(id -u)" = 0 ]; then SUDO=; else SUDO="sudo -n"; fi; \
	  { $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	  || { echo "chromium is missing and could not be installed: run 'sudo apt-get install chromium'"; exit 1; }; }

lint: $(PACKAGES)     ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(PACKAGES)    ## mypy, strict
	$(BIN)/mypy

bench: install    ## Run every benchmark, or one: make bench ARGS=delivery
	$(BIN)/python -m bench $(ARGS)

chaos: install    ## Break a pipeline on purpose and check every record: make chaos ARGS="--minutes 60 --seed 1"
	@exec $(BIN)/ray-pipeline chaos --start $(ARGS)

settings: install ## Write docs/settings.md from the settings model
	$(BIN)/python -m ray_pipeline.command.documenting docs/settings.md

clean:            ## Remove what was built here
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
