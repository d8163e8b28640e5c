# Everything that building and checking needs. `make demo` and `make test` do all the set-up on a fresh machine.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# torch goes first: anything else would let pip take its newest CUDA build, several GB. With a GPU, choose a build:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
TORCH ?= torch==2.13.0

.PHONY: demo test test-slow test-gpu check docs install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/fedtune train --challenge tiny
	$(BIN)/fedtune eval --bench tiny --peft peft_16 --base

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev,ray]'
	$(BIN)/python -m pytest -m slow

test-gpu: install
	$(BIN)/python -m pytest -m gpu

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_reference.py

docs: install
	$(BIN)/python docs/reference/generate.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
