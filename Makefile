# Needs Python 3.10 or newer and make, nothing else. `make demo` and `make test` set up on their own.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= runs/demo
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint types unit test-slow soak quality bench docs clean

help:
	@echo "make demo       set up, train on examples/fashion.zip for a few minutes, draw new images: demo.png"
	@echo "make test       set up, then lint, types and tests"
	@echo "make test-slow  the long tests too"
	@echo "make soak       100 kills and much fuzzing, see docs/reliability.md: about an hour"
	@echo "make quality    the tables of benchmarks/quality.py: make quality TRAIN=images.zip HELDOUT=others.zip; hours"
	@echo "make bench      speed and memory beside other tools: benchmarks/RESULTS.md; about half an hour on an idle machine"
	@echo "make docs       the pages of docs/ as a site in site/; about two minutes, for the tutorial trains a model"
	@echo "make clean      remove the environment and the demo"

$(READY): pyproject.toml
	@echo "== setting up $(VENV) (PyTorch: minutes, gigabytes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch torchvision
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

demo: $(READY)
	@echo "== training on examples/fashion.zip, 4 to 9 minutes on 2 cores"
	@if [ -e $(DEMO)/run.yaml ]; then $(BIN)/ddpmctl train --resume $(DEMO) $(DEMO_FLAGS); \
	else $(BIN)/ddpmctl train examples/fashion.zip --config examples/quickstart.yaml --out $(DEMO) $(DEMO_FLAGS); fi
	$(BIN)/ddpmctl sample $(DEMO) -n 60 --quality fast --guidance 1.7 -o demo.png --scale 2 --overwrite
	@echo "== look at demo.png"

test: lint types unit

lint: $(READY)
	@echo "== lint"
	$(BIN)/ruff check .

types: $(READY)
	@echo "== types"
	$(BIN)/mypy

unit: $(READY)
	@echo "== tests"
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m "slow or not slow"

soak: $(READY)
	DDPMCTL_KILLS=50 DDPMCTL_FUZZ=12 $(BIN)/python -m pytest -q -s -m 'slow or not slow' tests/reliability

quality: $(READY)
	@test -n "$(TRAIN)" -a -n "$(HELDOUT)" || { echo "give two folders or zips of images: make quality TRAIN=... HELDOUT=..."; exit 2; }
	$(BIN)/python benchmarks/quality.py "$(TRAIN)" "$(HELDOUT)" $(QUALITY_FLAGS)

bench: $(READY)
	$(BIN)/python -m pip install -q -e '.[dev,bench]'
	$(BIN)/python benchmarks/speed.py --out benchmarks/RESULTS.md $(BENCH_FLAGS)

docs: $(READY)
	PATH="$$(cd "$(BIN)" && pwd):$$PATH" $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) demo.png site
