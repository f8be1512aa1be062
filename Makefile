# Everything lives in .venv; paths are relative, so that a checkout may have any name.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# The interpreter to build .venv with, if not the newest suitable one:  make run PYTHON=python3.12
PYTHON ?=
# More for pytest or the bench:  make test ARGS="-k stream -x"
ARGS ?=

python := .venv/bin/python
pip := $(python) -m pip --disable-pip-version-check --no-input --quiet install -c constraints.txt
inputs := pyproject.toml constraints.txt

# A .venv that is broken, unfinished, or was made in another place is built again.
ifneq ($(shell { $(python) -c 'import pip' && cat .venv/checkout; } 2>/dev/null),$(shell pwd -P))
.PHONY: .venv/checkout
endif

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

.PHONY: run
run: .venv/installed ## Start the server, with a PostgreSQL of its own unless DATABASE_URL is set
	@exec $(python) run.py

.PHONY: test
test: .venv/installed-dev ## Run the tests
	@$(python) -m pytest -n auto --dist worksteal $(ARGS)

.PHONY: faults
faults: .venv/installed-dev ## Let nodes, database and network fail in SEEDS (200) random histories
	@FAULTS_SEEDS=$(or $(SEEDS),200) FAULTS_FIRST=$(or $(FIRST),1) \
	  $(python) -m pytest -n auto --dist worksteal tests/faults $(ARGS)

.PHONY: soak
soak: .venv/installed-dev ## Come and go for SOAK_SECONDS (1800); nothing may be left behind
	@SOAK_SECONDS=$(or $(SOAK_SECONDS),1800) $(python) -m pytest -s tests/soak $(ARGS)

.PHONY: bench
bench: .venv/installed ## Measure the service and its peers side by side; see bench/README.md
	@exec $(python) -m bench $(ARGS)

.PHONY: bench-quick
bench-quick: .venv/installed ## The same with 2,000 streams, once, in under 3 minutes
	@exec $(python) -m bench --quick $(ARGS)

.PHONY: check
check: .venv/installed-dev ## Check format, style, types and the layers of the modules
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy
	$(python) -c 'import sys; sys.path.insert(0, "."); from importlinter.cli import lint_imports_command; lint_imports_command()'

.PHONY: docs
docs: .venv/installed-docs ## Build the documentation into build/site; any warning is an error
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict
	@echo "Open build/site/index.html"

.PHONY: venv
venv: .venv/installed-dev ## Build .venv with all that developing needs

.PHONY: clean
clean: ## Remove .venv and what the tools leave behind
	rm -rf .venv bench/.peers bench/out build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

.venv/installed: .venv/checkout $(inputs)
	@echo "Installing into .venv"
	@$(pip) hatchling editables
	@$(pip) --no-build-isolation --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing the development tools into .venv"
	@$(pip) --no-build-isolation --editable '.[dev]'
	@touch $@

.venv/installed-docs: .venv/installed
	@echo "Installing the tools for the documentation into .venv"
	@$(pip) --no-build-isolation --editable '.[docs]'
	@touch $@

.venv/checkout:
	@found=; bare=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3); do \
	  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	  if "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	  bare=$${bare:-$$candidate}; \
	done; \
	if [ -z "$$found" ] && [ -n "$$bare" ]; then \
	  echo "$$bare has no venv module: install it (on Debian and Ubuntu: apt install python3-venv), or name another Python with PYTHON=." >&2; \
	  exit 1; \
	elif [ -z "$$found" ]; then \
	  echo "No Python 3.11 or newer was found$(if $(PYTHON), at $(PYTHON)): install one, or name it with PYTHON=." >&2; \
	  exit 1; \
	fi; \
	echo "Building .venv with $$found"; \
	"$$found" -m venv --clear .venv && pwd -P > $@
