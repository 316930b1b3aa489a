# Two commands do everything on a machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format clean

# Fine-tunes an encoder on real text in a few minutes; MODEL=google/gemma-3-270m starts from a real checkpoint.
demo: $(READY)
	$(BIN)/python examples/demo.py $(if $(MODEL),--model $(MODEL))

test: $(INSTALLED) lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Versions come from constraints.txt, the ones this code was tested with. The demo needs what training needs; tests all.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train]"
	touch $@

$(INSTALLED): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train,rank,ray,onnx,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo_output
