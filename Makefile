.DEFAULT_GOAL := help
.PHONY: help .venv .venv-cuda demo demo-digits demo-ddp demo-sharded test test-all test-cuda fuzz lint format docs dist bench programs clean

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CUDA_BIN := .venv-cuda/bin
CUDA_STAMP := .venv-cuda/.installed

# Where it is set, every process of the tests compiles all of torch's modules again, for half a minute.
unexport PYTHONDONTWRITEBYTECODE

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: $(STAMP) ## create the virtual environment, or bring it up to date

# torch first: the rest then finds its requirement met and does not ask for another build of it.
# Modules are compiled by who imports them first: most of what is installed never is.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

.venv-cuda: $(CUDA_STAMP) ## the same with a CUDA build of torch, which needs 4.7 GB

# Three equal signs: a local build such as 2.13.0+cpu is not meant.
$(CUDA_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-cuda
	$(CUDA_BIN)/pip install --quiet --no-compile torch===2.13.0
	$(CUDA_BIN)/pip install --quiet --no-compile -c constraints.txt numpy pytest pytest-xdist -e '.[cli]'
	@touch $@

demo: .venv ## train a small GPT on the standard library's source, beside torch.amp
	$(BIN)/python examples/gpt_stdlib.py

demo-digits: .venv ## train a conv net with BatchNorm on scikit-learn's digits
	$(BIN)/python examples/digits_cnn.py

demo-ddp: .venv ## train a GPT on two processes, gradients averaged inside the step
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 examples/ddp_gpt.py

demo-sharded: .venv ## train a GPT of which each of two processes keeps half
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 examples/sharded_gpt.py

test: lint ## what CI checks: lint, types, and the tests on two processes, but for a few slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-all: lint ## the same with the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-cuda: .venv-cuda ## the CUDA path: on a GPU, or compiled, counted and emulated without one
	$(CUDA_BIN)/python -m tests.cuda -q -m "not slow"

N ?= 300
SEED ?= 0

fuzz: .venv ## compare N generated training programs with eager PyTorch, from SEED on
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz -n $(N) --seed $(SEED) --out out/fuzz

lint: .venv ## ruff and pyrefly
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --output-format min-text

format: .venv ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv ## build the documentation and the API reference into out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: .venv ## build wheel and source distribution into dist/, and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

bench: .venv ## one step beside its peers: memory, time and losses, few tokens and many
	$(BIN)/python -m bench.step --tokens 64
	$(BIN)/python -m bench.step --tokens 512

programs: .venv ## train 40 of the public training programs of docs/programs.md
	$(BIN)/python -m bench.programs --quick

clean: ## remove the environment, caches and outputs
	rm -rf .venv .venv-cuda out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
