# Everything a newcomer types. `make` alone lists the targets. ARGS="..." is handed on: make train ARGS="--run.dir runs/b".
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := test
INSTALLED := $(VENV)/.installed
CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())" 2>/dev/null || echo 1)
# accelerate launch gives each process one thread unless told otherwise.
LAUNCH = $(BIN)/accelerate launch --quiet --num_cpu_threads_per_process $(CORES)
# Said in full, so that nothing is guessed: one process, wherever it runs best.
LAUNCH_ONE = $(LAUNCH) --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
# Test processes: each takes one thread and up to 2 GB.
TEST_JOBS := $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 )))
DEMO_DATA := data/stdlib-bytes
DEMO_RUN := runs/demo

.DEFAULT_GOAL := help
.PHONY: help install demo prepare-data train test lint check bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(INSTALLED) ## make or update .venv with the package and what the tests need

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; Python 3.11 or later is needed: make install PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: install ## see it work: prepare, train and sample a small GPT-2 on this machine, no download of data
	$(BIN)/toolkit prepare stdlib --out $(DEMO_DATA) --tokenizer bytes
	$(LAUNCH_ONE) recipes/train_demo.py --data.path $(DEMO_DATA) --run.dir $(DEMO_RUN) $(ARGS)
	$(BIN)/toolkit generate $(DEMO_RUN) "def main(" --max-new-tokens 300
	@echo
	@echo "The run is in $(DEMO_RUN): metrics.jsonl, samples.jsonl, checkpoints/. Try next:"
	@echo '  $(BIN)/toolkit generate $(DEMO_RUN) "import " --temperature 0.5'
	@echo '  $(BIN)/toolkit export $(DEMO_RUN) exports/demo      # a folder for transformers'
	@echo '  make train ARGS="--help"                           # every setting of the 124M run'

prepare-data: install ## FineWeb-Edu sample-10BT from the Hub -> data/fineweb-edu-10b (about 20 GB)
	$(BIN)/python recipes/prepare_fineweb_edu.py $(ARGS)

train: install ## the 124M run on FineWeb-Edu; continues where it stopped
	$(LAUNCH) recipes/train_124m.py $(ARGS)

test: install ## the test suite: no network but the package index; a GPU is used if there is one
	$(BIN)/python -m pytest -n $(TEST_JOBS) $(ARGS)

lint: EXTRAS := dev
lint: install
	@test -x $(BIN)/ruff -a -x $(BIN)/mypy || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test ## format, lint, types and tests

bench: install ## the benchmarks: a table and a picture in bench-results/
	$(BIN)/python -m tests.benchmarks $(ARGS)

clean: ## remove caches; never data, runs or .venv
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find toolkit recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
