# `make demo` and `make test` set up everything they need in .venv; see `make help`.

# Any Python that pyproject.toml allows; CI runs 3.11. Only used to create .venv.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?= --quick

BIN := $(CURDIR)/.venv/bin
DEPS := .venv/.deps-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Depends on the package onnxruntime, which must not come beside onnxruntime-gpu; that one does as well.
GENAI := "onnxruntime-genai>=0.18; sys_platform == 'linux' and platform_machine == 'x86_64'"

# Nothing of the caller's may put other code on the import path.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test bench check format dev install clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Threads that wait without spinning: slower by a little when idle, faster beside another busy process.
demo: install ## fine-tune MiniLM on real text, merge, export to ONNX, check (under 3 minutes on 2 cores)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/lorafx demo

# The tests run against the built wheel: from an empty directory, so that the checkout is not importable.
# One thread a worker: two workers with a pool each would fight over the cores.
test: check install ## everything CI runs: check, then the tests against the built wheel
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && cd "$$dir" && \
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	$(BIN)/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) $(CURDIR)/tests \
		-n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

bench: install ## what adapters cost beside the frozen model and PEFT: 3 minutes (BENCH_ARGS=--all: everything, hours)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/tax.py $(BENCH_ARGS)

check: $(DEPS) ## lint, formatting, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEPS) ## rewrite the code in its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dev: $(DEPS) ## install lorafx editable, until the next `make test` installs the wheel
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .

# The wheel is built from the sdist, in a directory of its own: both get tested, and nothing stale is
# picked up from the checkout.
install: $(DEPS)
	rm -rf build dist *.egg-info
	$(BIN)/python -m build --quiet --no-isolation
	$(PIP) install --quiet --no-deps --force-reinstall dist/*.whl

$(DEPS): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "lorafx needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt ".[test,dev]"
	$(PIP) install --constraint constraints.txt --no-deps $(GENAI)
	rm -rf build *.egg-info
	touch $@

clean: ## remove what make has made, .venv included
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
