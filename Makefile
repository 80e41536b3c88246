# make serve    start the server (and install what it needs, the first time)
# make help     list the rest

PYTHON ?= python3
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
OPENAI_PORT ?= 8003
ADDRESS ?= 127.0.0.1
ARGS ?=
# `make bench` ends in some ten minutes on two cores with these; `specserve bench` has them all.
BENCH_TRACE ?= $(if $(SPECSERVE_DATA),azure_2023_conv,poisson)
BENCH_OUTPUT ?= build/bench/$(shell git describe --always --dirty --abbrev=12)
BENCH_ARGS ?= --load 0.3 --load 0.7 --slo-scale 1 --window-s 10 --warm-up-s 4 --length-scale 0.25 \
  --low-requests 12 --flood-requests 30
# The results under bench/results: both Azure traces, every policy, three loads; 40 minutes on
# two cores that are quiet, and a quarter of an hour. Both go on where they were stopped.
GRID := bench/results/grid.jsonl
GRID_ARGS := --load 0.3 --load 0.6 --load 0.9 --slo-scale 1 --window-s 16 --warm-up-s 5 \
  --length-scale 0.25
GRID_SIMULATED := bench/results/grid_simulated.jsonl
GRID_SIMULATED_ARGS := --window-s 60 --repeats 6 --set scheduler.max_seq_len=2048

# Measured anew each time, on the machine as it is; bf16 where it computes in it, else f32.
BENCH_ENGINES = --set engine.dir=build/bench_target \
  --set engine.precision=$$($(BIN)/python -m bench.precision)
BENCH_LIMITS := --set scheduler.max_num_seqs=16

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PINS := pyproject.toml constraints.txt
# Installed without their dependencies: optimum-intel asks for a torchvision that breaks
# transformers beside a CPU-only torch.
OPTIMUM := optimum==2.3.0 optimum-intel==2.2.0

SERVE := $(VENV)/.serve-installed
BUILD := $(VENV)/.build-installed
TEST := $(VENV)/.test-installed
BENCH := $(VENV)/.bench-installed
CLIENTS := $(VENV)/clients/.installed

.DEFAULT_GOAL := help
.PHONY: help serve build test quick bench grid grid-simulated readme clients check clean
.DELETE_ON_ERROR:

help:
	@echo 'make serve   start the server; HTTP_PORT GRPC_PORT METRICS_PORT OPENAI_PORT ADDRESS ARGS'
	@echo 'make build   install what building engines needs (torch, transformers, optimum-intel)'
	@echo 'make test    run the tests; make quick: those without a server, some minutes'
	@echo 'make clients install aiperf, 1.2 GB, for the tests that run it'
	@echo 'make bench   measure every policy on a server, in ten minutes; SPECSERVE_DATA BENCH_ARGS ...'
	@echo 'make grid    the long one, for bench/results; make grid-simulated; SPECSERVE_DATA'
	@echo 'make readme  write the tables of bench/README.md anew from bench/results'
	@echo 'make check   run ruff and mypy'
	@echo 'make clean   remove $(VENV) and the caches'
	@echo 'PYTHON=python3.12 chooses the Python that $(VENV) is made with (3.11 or 3.12)'

# exec: the launcher takes the shell's place and gets the signals itself.
serve: $(SERVE)
	@exec $(BIN)/specserve serve --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) \
	  --metrics-port $(METRICS_PORT) --openai-port $(OPENAI_PORT) --address $(ADDRESS) $(ARGS)

build: $(BUILD)

# A server takes both cores; tests without one take one each.
test: $(TEST)
ifeq ($(ARGS),)
	@$(BIN)/pytest tests -n 2 --dist loadfile -m 'not triton'
	@exec $(BIN)/pytest tests -m triton
else
	@exec $(BIN)/pytest tests $(ARGS)
endif

quick: $(TEST)
	@exec $(BIN)/pytest tests -n 2 --dist loadfile -m 'not triton and not slow' $(ARGS)

bench: $(BENCH)
	@$(BIN)/python -m build_engines bench-target --output build/bench_target
	@$(BIN)/specserve profile $(BENCH_ENGINES)
	@$(BIN)/specserve bench --trace $(BENCH_TRACE) --output $(BENCH_OUTPUT).jsonl \
	  $(BENCH_ENGINES) $(BENCH_LIMITS) $(BENCH_ARGS)
	@$(BIN)/specserve report $(BENCH_OUTPUT).jsonl --output $(BENCH_OUTPUT)

grid: $(BENCH)
	@$(BIN)/python -m build_engines bench-target --output build/bench_target
	@test -s $(GRID) || $(BIN)/specserve profile $(BENCH_ENGINES)
	@$(BIN)/specserve bench --output $(GRID) $(BENCH_ENGINES) $(BENCH_LIMITS) $(GRID_ARGS)
	@$(BIN)/specserve report $(GRID) --output build/report
	@$(BIN)/python -m bench.readme

grid-simulated: $(BENCH)
	@$(BIN)/specserve bench --mode simulated --summary-only --output $(GRID_SIMULATED) \
	  $(BENCH_LIMITS) $(GRID_SIMULATED_ARGS)
	@$(BIN)/specserve report $(GRID_SIMULATED) --output build/report_simulated
	@$(BIN)/python -m bench.readme

readme: $(BENCH)
	@$(BIN)/python -m bench.readme

clients: $(CLIENTS)

check: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) not found: install Python 3.11 or 3.12, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || \
	  { echo "$(PYTHON) is not Python 3.11 or 3.12: set PYTHON=python3.11 (or python3.12)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(SERVE): $(PINS) | $(BIN)/python
	@echo 'Installing the server into $(VENV) ...'
	@$(PIP) -e '.[serve]'
	@touch $@

$(BUILD): $(PINS) $(SERVE)
	@echo 'Installing what building engines needs ...'
	@$(PIP) -e '.[serve,build]'
	@$(PIP) --no-deps $(OPTIMUM)
	@touch $@

$(TEST): $(PINS) $(SERVE)
	@echo 'Installing what the tests need ...'
	@$(PIP) -e '.[serve,build,test]'
	@$(PIP) --no-deps $(OPTIMUM)
	@touch $@

$(BENCH): $(PINS) $(BUILD)
	@echo 'Installing what reports need ...'
	@$(PIP) -e '.[serve,build,report]'
	@touch $@

# In an environment of its own: aiperf pins other versions of what the tests use.
$(CLIENTS): tests/aiperf.txt | $(BIN)/python
	@echo 'Installing aiperf ...'
	@$(BIN)/python -m venv $(VENV)/clients
	@$(VENV)/clients/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
