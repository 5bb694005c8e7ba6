# `make demo` and `make test` set themselves up (TORCH=cpu: with a torch without CUDA); `make help` lists the rest.
# RANKS=N sets the ranks of the demo.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED := 1
.DEFAULT_GOAL := help
FAULTS ?= 80
JOBS ?= 2
ADDRESS ?= 127.0.0.1:8000
.PHONY: help install constraints demo test test-rest test-all nightly check format bench docs serve soak faults matrix

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: .venv/installed  ## the virtual environment with everything pinned; TORCH=cpu for a torch without CUDA

.venv/installed: pyproject.toml constraints.txt launch/install.sh
	@PYTHON=$(PYTHON) TORCH=$(TORCH) launch/install.sh
	@touch $@

demo: install  ## raw text -> trained and exported model -> scores, in minutes on two cores
	@PATH="$(CURDIR)/$(BIN):$$PATH" RANKS=$(RANKS) launch/demo.sh

test: install  ## tests of every part, in minutes; JOBS=2 processes share the files
	$(BIN)/python -m pytest -m "not gate" -n $(JOBS) --dist loadfile

test-rest: install  ## what test leaves out of test-all: Slurm, layouts, dry runs at full width, benchmarks run small
	$(BIN)/python -m pytest -m gate

test-all: test test-rest  ## everything that gates a change

nightly: soak faults matrix  ## what is too long to gate

check: install  ## style, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the marker that every line would bear is left out
constraints: install  ## constraints.txt anew from pyproject.toml and constraints.in; UPGRADE=--upgrade for newer releases
	$(BIN)/uv pip compile -q pyproject.toml --all-extras -c constraints.in --universal --python-version 3.11 \
	    --no-annotate --custom-compile-command "make constraints" $(UPGRADE) -o constraints.txt
	@sed -i "s/ ; python_full_version < '3.14' and sys_platform == 'linux'$$//" constraints.txt

# the extra is installed when it is missing, or when what it asks for has changed
.venv/docs-installed: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: .venv/docs-installed  ## the documentation as a site in runs/site; prints where it is
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/mkdocs.yml
	@echo "site: $(CURDIR)/runs/site/index.html"
	@echo "make serve shows it with search, and builds it again after every edit"

serve: .venv/docs-installed  ## the documentation at http://127.0.0.1:8000 (ADDRESS=HOST:PORT), built again after every edit
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve -f docs/mkdocs.yml -a $(ADDRESS)

bench: install  ## CPU kernels beside their baselines; on a GPU: .venv/bin/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.cpu

soak: install  ## the demo under FAULTS seeded faults of all kinds, bit for bit as a clean run; Ctrl-C pauses it
	$(BIN)/python examples/make_demo_corpus.py
	$(BIN)/python data/prepare.py +experiment=demo
	$(BIN)/python -m tests.soak --faults $(FAULTS)

faults: install  ## every fault of docs/design/faults.md, the long ones too, and a table of what was measured
	$(BIN)/python -m pytest -q --faults

matrix: install  ## every layout of up to 16 ranks x engine x precision against one rank: half an hour on two cores
	$(BIN)/python -m pytest -q tests/train/test_matrix.py --slow
