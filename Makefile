# make setup, demo, serve, test, bench, bench-full, accuracy, peers, clean. Everything is installed into .venv; no compiler is needed.
# ARGS is passed on: make demo ARGS="--http-port 9000 --grpc-port 9001 --metrics-port 9002", make test ARGS=tests/unit.
PYTHON ?= python3
VENV := .venv
SUN := $(VENV)/bin/sun
STAMP := $(VENV)/.installed
CHECKS := $(VENV)/.checks
DATA ?= ../shared/data
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: setup demo serve test bench bench-full accuracy peers clean

setup: $(STAMP)
	@$(SUN) setup

$(STAMP): requirements.txt requirements-nodeps.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Python 3.11 to 3.13 is needed, $(PYTHON) is another; choose one with make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --only-binary :all: -r requirements.txt
	$(PIP) install --only-binary :all: --no-deps -r requirements-nodeps.txt
	$(PIP) install --no-deps -e .
	@touch $@

demo: setup
	@$(SUN) demo $(ARGS)

serve: setup
	@exec $(SUN) serve $(ARGS)

# In two processes, one of them for the tests with servers (tests/conftest.py); ARGS="-n 0" makes it one.
test: setup $(CHECKS)
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

# What deploy/, the dashboard and the GPU's kernels are checked with; nothing else needs it.
$(CHECKS): $(STAMP) requirements-checks.txt
	$(PIP) install --only-binary :all: --no-deps -r requirements-checks.txt
	@touch $@

# Conventional disaggregation against SUN: 12 minutes, or all systems and mixes in 46. Results and figures go into perf/results.
bench bench-full: setup
	@$(VENV)/bin/python -m sun_perf.bench $(if $(filter bench-full,$@),full,quick) $(ARGS)

# Hours on a CPU; goes on where it ended. DATA holds banking/, math/ and bash/. ARGS="--tasks banking" makes a part of it.
accuracy: setup
	$(VENV)/bin/python -m sun_perf.accuracy --data $(DATA) $(ARGS)

# Half an hour on an idle machine, with ours and other engines by turns. ARGS="--setup llama vllm" installs two of them; ARGS="llama" measures one.
peers: setup
	$(VENV)/bin/python -m sun_perf.peers $(ARGS)

# Tasks are the folders that have a prefill module; the other models of the repository are committed.
clean:
	@for prefill in model_repository/prefill_*; do \
	  task=$${prefill#model_repository/prefill_}; \
	  if [ -d "$$prefill" ]; then rm -rf "$$prefill" "model_repository/$$task" "model_repository/kv_$$task"; fi; \
	done
	rm -rf $(VENV) .run build/base backends/python backends/onnxruntime backends/tensorrt *.egg-info
	find backends build client perf tests -name __pycache__ -type d -prune -exec rm -rf {} +
