# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
# PYTHON is any Python from 3.11; packages go into .venv, pinned by .ci/constraints.txt.

PYTHON ?= python3
CORE_HOURS ?= 2
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt

.PHONY: demo test lint suite slow sweep fuzz campaign bench clean

demo: $(VENV)/demo
	$(BIN)/shardkit demo

test: lint suite

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

suite: $(VENV)/dev
	OMP_NUM_THREADS=1 .ci/offline $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow --ignore tests/authoring/test_proof.py

sweep: $(VENV)/dev
	$(BIN)/shardkit recipes check --all --write
	$(BIN)/shardkit recipes check --formats --write
	$(BIN)/shardkit recipes check --batching --write
	$(BIN)/shardkit recipes check --blocks --write

fuzz: $(VENV)/dev
	$(BIN)/python -m tests.reliability.fuzz.run --all --core-hours $(CORE_HOURS) --report

campaign: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.verification.campaign wrong --seeds 20 --report wrong.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.verification.campaign right --trials 1500 --report right.jsonl

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.split
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python -m benchmarks.decode

$(VENV)/demo: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/dev: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
