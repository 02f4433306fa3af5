# Every target stands on `make setup`, which leaves .venv/bin/hpc-rl and does nothing twice.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
FLAVOUR ?= cpu
BIN := .venv/bin
JOBS ?= 2

.PHONY: help setup quickstart test test-fast learn bench lint format constraints golden clean
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: ## Debian packages (as root), the pinned environment, .venv/bin/hpc-rl
	@$(PYTHON) tools/bootstrap.py --flavour $(FLAVOUR)

quickstart: setup ## a tiny model learns by SFT and GRPO, in under ten minutes on two cores
	@$(BIN)/python recipes/quickstart/run.py

test-fast: setup ## tests that start no server (under a minute)
	$(BIN)/python -m pytest -q -m "not slurm and not redis and not vllm and not torch and not slow and not learn"

test: setup ## everything but the learning runs: real Slurm, Redis, vLLM; JOBS=1 runs one test at a time
	$(BIN)/python -m pytest -q -m "not learn" -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 30

learn: setup ## the longer learning runs
	$(BIN)/python -m pytest -q -s -m learn --timeout 3600

bench: setup ## every benchmark (*_gpu only where there is one); the last line of each is JSON
	@for file in benchmarks/[a-z]*.py; do name=$$(basename $$file .py); \
	  case $$name in *_gpu) \
	    $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || continue;; esac; \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

lint: setup ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .

constraints: setup ## resolve the pinned sets anew
	@$(BIN)/python tools/constraints.py

clean:
	rm -rf .venv .setup .pytest_cache .mypy_cache .ruff_cache
