# kdecs: every target sets up what it needs, so that one command is enough.
# A variable that users set: RECCON=dir (real data), TORCH_INDEX=url (another build of torch), PYTHON=python3.11.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= $(if $(RECCON),runs/demo-reccon,runs/demo)
SETUP := $(VENV)/.complete

# DeepSpeed's one compiled helper for CPU ranks is built once, by `make setup`, and kept in the project.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: help setup demo test test-slow test-all check format ui sweep select clean

help:
	@echo "make demo [RECCON=dir]   the whole pipeline with small models: corpus, teachers, soft labels, sweep, report"
	@echo "make test                the default tests (about three minutes on two cores)"
	@echo "make test-slow           the long tests: several ranks, kills, Ray"
	@echo "make check               format, lint, types, import rules"
	@echo "make ui                  the MLflow UI of the demo, on loopback"
	@echo "make sweep SPACE=file    a sweep;  make select SWEEP=dir   choose and register its best student"
	@echo "make setup               only the virtual environment, from pinned constraints"
	@echo "make clean               remove what the demo wrote ($(RUN)), not the environment"

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kdecs needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python launch/prepare_extensions.py
	@touch $@

demo: $(SETUP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python launch/demo.py --output "$(RUN)" $(if $(RECCON),--reccon "$(RECCON)")

test: $(SETUP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not slow and not gpu and not cluster"

test-slow: $(SETUP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "slow and not gpu and not cluster"

test-all: test test-slow

check: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(SETUP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: $(SETUP)
	@test -f "$(RUN)/mlflow.db" || { echo "$(RUN)/mlflow.db: no runs yet; start with: make demo" >&2; exit 1; }
	@echo "MLflow UI of $(RUN): http://127.0.0.1:5000 (Ctrl-C ends it)"
	$(BIN)/mlflow ui --backend-store-uri "sqlite:///$(abspath $(RUN))/mlflow.db" --host 127.0.0.1 --port 5000

sweep: $(SETUP)
	@test -n "$(SPACE)" || { echo "make sweep SPACE=tune/spaces/main.yaml" >&2; exit 2; }
	$(BIN)/python tune/sweep.py "$(SPACE)"

select: $(SETUP)
	@test -n "$(SWEEP)" || { echo "make select SWEEP=runs/sweeps/main" >&2; exit 2; }
	$(BIN)/python tune/select_student.py --sweep "$(SWEEP)"

clean:
	rm -rf "$(RUN)"
