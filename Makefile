# Set-up and every command of development: `make` lists them. Needs Python 3.11 or newer and nothing else; npm, where it
# is there, brings the programs (clients, SDKs, an MCP server) that some tests drive. Works with GNU Make 3.81 (macOS) and newer.

# Give the interpreter on the command line to choose another one: make PYTHON=/path/to/python3.13 run
PYTHON =
PYTHONS = $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14)
# More arguments for `run`, `test`, `fuzz`, `chaos`, `demo`, `example`, `bench`, `bench-quick` and `soak`: make run ARGS="--port 9000"
ARGS =
# How hard `fuzz` tries.
FUZZ_EXAMPLES = 20000
# The version to compare with. Portkey's is in benchmarks/tools/portkey.json.
LITELLM = 1.106.2

VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL = $(PIP) install --constraint constraints.txt
# The backend is installed beside the rest, so that constraints.txt holds for it too (pip does not pass constraints on
# to the environment that it would build in otherwise). Hatchling needs editables for an editable install.
BACKEND = hatchling editables

CLIENTS = tests/clients
CLIENTS_JSON = $(wildcard $(CLIENTS)/package.json)
NPM = $(shell command -v npm 2>/dev/null)

# What must stay covered to the last line: the core, which is pure (docs/architecture.md).
CORE = src/aibridge/wire/*,src/aibridge/conversation.py,src/aibridge/merger.py,src/aibridge/commands.py,src/aibridge/records.py,src/aibridge/clients.py,src/aibridge/errors.py,src/aibridge/tools.py,src/aibridge/limits.py,src/aibridge/breakers.py,src/aibridge/retries.py,src/aibridge/summaries.py

# The caller's shell decides neither which modules Python finds nor how the tests run: another active environment,
# PYTHONPATH, PYTHONHOME and their kind stay outside.
unexport VIRTUAL_ENV __PYVENV_LAUNCHER__ PIP_USER PIP_TARGET PIP_PREFIX MYPYPATH
unexport $(filter PYTHON% PYTEST_% COVERAGE_%,$(.VARIABLES))

.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
# Where `chaos` writes what it has observed.
RELIABILITY = docs/reliability.md

.PHONY: help run demo example test lint format types fuzz chaos bench bench-quick bench-peers soak build constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

run: $(VENV)/.runtime ## set up and serve on 127.0.0.1:8080 with SQLite in ./aibridge.db (ARGS="...": more arguments)
	@exec $(BIN)/aibridge serve $(ARGS)

demo: $(VENV)/.runtime ## play a short conversation with a scripted provider and print the ledger; needs no keys
	@exec $(BIN)/aibridge demo $(ARGS)

example: $(VENV)/.dev ## run the example of the library's use
	@$(BIN)/python example/main.py $(ARGS)

# A file's tests stay together: what some of them play once is judged by many.
test: $(VENV)/.dev clients ## set up and run all the tests, in parallel, then check the core's coverage (100 % of lines)
	@rm -f .coverage .coverage.*
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --cov --cov-report= $(ARGS)
	@echo "Coverage of the core:"
	@$(BIN)/python -m coverage report --include='$(CORE)' --show-missing --skip-covered --fail-under=100

lint: $(VENV)/.dev ## check style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(VENV)/.dev ## format, and mend what the linter can mend
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: $(VENV)/.dev ## check types, strictly
	$(BIN)/python -m mypy

fuzz: $(VENV)/.dev ## the long fuzz run over the wire formats (FUZZ_EXAMPLES=20000)
	AIBRIDGE_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest --numprocesses auto tests/test_fuzz.py $(ARGS)

chaos: $(VENV)/.dev ## bring every fault about with real processes, and write the table of docs/reliability.md: five minutes
	@$(BIN)/python -m tests.chaos --output $(RELIABILITY) $(ARGS)

bench: $(VENV)/.dev ## measure what the gateway costs beside nginx and the peers that are installed: a quarter of an hour
	@$(BIN)/python -m benchmarks $(ARGS)

bench-quick: $(VENV)/.dev ## the same with fewer and shorter rounds: under two minutes
	@$(BIN)/python -m benchmarks --quick $(ARGS)

soak: $(VENV)/.dev ## ten minutes of mixed traffic: is memory flat, do descriptors stay?
	@$(BIN)/python -m benchmarks.soak $(ARGS)

# Each in an environment of its own, below .bench: what they need is not what we need.
bench-peers: $(VENV)/.created ## install the gateways to compare with: LiteLLM, and Portkey where npm is
	$(BIN)/python -m venv .bench/litellm
	.bench/litellm/bin/python -m pip --disable-pip-version-check --quiet install 'litellm[proxy]==$(LITELLM)'
	@mkdir -p .bench/portkey
	cp benchmarks/tools/portkey.json .bench/portkey/package.json
	$(if $(NPM),npm install --prefix .bench/portkey --no-audit --no-fund --ignore-scripts,@echo "npm is not there: no Portkey.")

build: $(VENV)/.runtime ## build the wheel into dist/
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

constraints: $(VENV)/.created ## resolve all dependencies anew, in a fresh environment, and pin them in constraints.txt
	@$(BIN)/python -m venv --clear $(VENV)-constraints
	$(VENV)-constraints/bin/python -m pip --disable-pip-version-check --quiet install $(BACKEND)
	$(VENV)-constraints/bin/python -m pip --disable-pip-version-check --quiet install --no-build-isolation '.[dev]'
	@{ echo "# Exact versions of everything that gets installed, for running and for development, build backend included."; \
	   echo "# Made by \`make constraints\`; do not edit. Use the oldest Python supported: it needs the backports too."; \
	   $(VENV)-constraints/bin/python -m pip freeze --exclude aibridge | LC_ALL=C sort -f; } > constraints.txt.new
	@if grep -n '[@/]' constraints.txt.new | grep -v '#'; then echo "not a plain pin, see above" >&2; exit 1; fi
	@mv constraints.txt.new constraints.txt
	@rm -rf $(VENV)-constraints

clean: ## remove what the targets above made, except databases
	rm -rf $(VENV) $(VENV)-constraints constraints.txt.new dist build .bench $(CLIENTS)/node_modules .coverage .coverage.* htmlcov
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests example benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# ---- set-up: each stamp is renewed when what it was made from changes ----

# -I: not from the current directory, not from PYTHON*. The base interpreter, so that an environment active now may go.
$(VENV)/.created:
	@for candidate in $(PYTHONS); do \
	  base=$$("$$candidate" -I -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1); import ensurepip, venv; print(sys._base_executable)' 2>/dev/null) \
	    && break; \
	  base=; \
	done; \
	if [ -z "$$base" ]; then \
	  echo "aibridge needs Python 3.11 or newer, with its venv module. Tried:" >&2; \
	  for candidate in $(PYTHONS); do \
	    echo "  $$candidate: $$("$$candidate" -I --version 2>/dev/null || echo 'not there')" >&2; \
	  done; \
	  echo "Install one (Debian: the packages python3 and python3-venv) or name one: make PYTHON=/path/to/python3.12 ..." >&2; \
	  exit 1; \
	fi; \
	echo "Creating $(VENV) with $$base"; \
	"$$base" -I -m venv --clear $(VENV)
	@touch $@

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing aibridge into $(VENV)"
	@$(INSTALL) $(BACKEND)
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing the tools of development into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

# The npm programs that tests drive. Set-up fails where npm fails; only a machine without npm goes without them.
.PHONY: clients
ifeq ($(NPM),)
clients:
	@echo "npm is not there: the tests that need Claude Code, Codex, the JavaScript SDKs or the reference MCP server will be skipped."
else
clients: $(if $(CLIENTS_JSON),$(CLIENTS)/node_modules/.installed)
endif

$(CLIENTS)/node_modules/.installed: $(CLIENTS_JSON)
	@echo "Installing the npm clients of the tests into $(CLIENTS)"
	@npm install --prefix $(CLIENTS) --no-package-lock --no-audit --no-fund
	@touch $@
