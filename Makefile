# `make help` lists the targets. Everything runs from .venv, which `make setup` keeps equal to constraints.txt.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
UV_VERSION := 0.13.9
CYCLONEDX_VERSION := 7.5.0
BIN := .venv/bin
TEST_WORKERS ?= 3
TIMES ?= 10
TESTS ?= tests
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --no-loadscope-reorder
STAMP := .venv/.installed

# uv does not read pip's find-links; with this, a CPU wheel of torch that pip can find is offered to uv too.
comma := ,
space := $(subst ,, )
FIND_LINKS := $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))")
UV := $(FIND_LINKS) UV_HTTP_TIMEOUT=180 DS_BUILD_OPS=0 $(BIN)/uv

# Sets $$python to the interpreter to use, or to nothing.
find_python = for python in "$(PYTHON)" python3 ""; do \
	  if [ -z "$$python" ] || "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; \
	  then break; fi; done

APT_GET_ONCE := apt-get -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20

.PHONY: help setup constraints test test-fast repeat lint types layers demo demo-long up down status logs faults bench gpu interop settings docs licences paper-scale sbom release format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Prometheus is tried again where it is missing, but not by each of the other targets.
setup: $(STAMP) $(if $(filter setup test,$(MAKECMDGOALS)),$(BIN)/prometheus) ## Install what is missing: system packages, then .venv from constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@need=""; $(find_python); \
	command -v g++ >/dev/null || need+=" g++"; \
	command -v npm >/dev/null || need+=" nodejs npm"; \
	command -v dpkg-deb >/dev/null || need+=" dpkg"; \
	command -v java >/dev/null || need+=" default-jre-headless"; \
	if [ -z "$$python" ]; then need+=" python3.11 python3.11-venv"; \
	elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then need+=" python3.11-venv"; fi; \
	if [ -n "$$need" ]; then \
	  install="apt-get install --yes --no-install-recommends$$need"; \
	  if ! command -v apt-get >/dev/null; then echo "make setup: missing$$need; install them and run it again" >&2; exit 1; \
	  elif [ "$$(id -u)" = 0 ]; then apt-get update -q && DEBIAN_FRONTEND=noninteractive $$install; \
	  elif sudo -n true 2>/dev/null; then sudo apt-get update -q && sudo DEBIAN_FRONTEND=noninteractive $$install; \
	  else echo "make setup: missing$$need; run: sudo $$install" >&2; exit 1; fi; \
	fi
	@$(find_python); [ -x $(BIN)/python ] || "$$python" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "make setup: installing into .venv; this takes a minute or two"
	@$(UV) pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo 'make setup: done; `export PATH="$(CURDIR)/.venv/bin:$$PATH"` lets a shell find its commands'

# With promtool, of Debian's package. It is not installed, since that would start a server.
$(BIN)/prometheus: | $(STAMP)
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	{ cd "$$folder" && \
	  { $(APT_GET_ONCE) download prometheus || { $(APT_GET_ONCE) update && $(APT_GET_ONCE) download prometheus; }; } && \
	  dpkg-deb --extract prometheus_*.deb . && \
	  install --mode 755 usr/bin/promtool usr/bin/prometheus "$(CURDIR)/$(BIN)"; } >"$$folder/log" 2>&1 || \
	  echo "make setup: Debian's package prometheus was not unpacked ($$(tail --lines 1 "$$folder/log")); tests of" \
	    "alerts and dashboards will be skipped; the next make setup tries again"

constraints: setup ## Resolve pyproject.toml into constraints.txt again
	@pins=$$($(UV) pip compile --quiet --upgrade --python-version 3.11 --no-annotate --no-header --extra dev --extra servers pyproject.toml); \
	header=$$(grep '^#' constraints.txt); \
	printf '%s\n' "$$header" "$$pins" | sed -E 's/^(torch==[0-9.]+)\+cpu$$/\1/' > constraints.txt

test: setup ## Everything that continuous integration runs
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint types layers
	@$(PYTEST)

test-fast: setup ## Run the quick tests: no Ray, no servers, no long ones
	@$(PYTEST) -m "not real and not ray and not slow"

repeat: setup ## Run the tests marked ray or slow ten times in a row; TIMES=3 TESTS=tests/train changes how often and which
	@for run in $$(seq $(TIMES)); do \
	  echo "make repeat: run $$run of $(TIMES)"; $(PYTEST) -m "(ray or slow) and not real" $(TESTS); done

lint: setup ## Check style and formatting, and that every import is declared
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/deptry vila_ops flows --optional-dependencies-dev-groups dev,docs
	@$(BIN)/deptry tests benchmarks docs --exclude '\.venv' --ignore DEP002

types: setup ## Check types with mypy, strict; also of what only runs where there is a GPU
	@$(BIN)/mypy
	@MYPYPATH=benchmarks $(BIN)/mypy benchmarks/gpu*.py

layers: setup ## Check which module imports which
	@$(BIN)/lint-imports

demo: setup ## Run the platform on this machine, from data to a served model
	@$(BIN)/vila-ops demo configs/recipes/demo.yaml -r configs/resources/laptop.yaml

demo-long: setup ## The demo with a budget of hours
	@$(BIN)/vila-ops demo configs/recipes/demo_long.yaml -r configs/resources/laptop.yaml

up: setup ## Start MLflow, Prefect, its worker and Ray on this machine
	@$(BIN)/vila-ops up

down: setup ## Stop what `make up` started
	@$(BIN)/vila-ops down

status: setup ## List these servers and their state
	@$(BIN)/vila-ops status

logs: setup ## Print the last lines of their logs
	@$(BIN)/vila-ops logs

faults: setup ## Kill processes, damage data, test as on other processors; VILA_SEED=N repeats a run
	@export VILA_SEED=$${VILA_SEED:-$$RANDOM}; echo "VILA_SEED=$$VILA_SEED"; \
	VILA_KILLS=100 VILA_KILLS_RAY=5 VILA_FAILPOINTS=3 VILA_ELASTIC=30 VILA_FLIPS=1000 VILA_DISK=50 VILA_KILLS_NODES=20 VILA_PLATFORM_KILLS=20 VILA_ZOMBIES=50 VILA_OUTAGE=900 VILA_OUTAGE_MLFLOW=600 VILA_OUTAGE_S3=300 \
	  VILA_URLS=10000 VILA_FUZZ=10000 VILA_LEAKS=5000 VILA_FAULTS=500 VILA_PARITY=all VILA_CALIBRATION=2000 \
	  VILA_PROMOTIONS=1000 VILA_HISTORIES=10000 VILA_EDITS=500 VILA_REQUESTS=20000 VILA_CHANGES=20 VILA_CANARIES=1000 VILA_NAMESPACES=1 \
	  $(BIN)/python -m pytest -v tests/faults tests/train/test_zero.py tests/train/test_watchdog.py \
	  tests/train/test_device_faults.py \
	  tests/data/download tests/data/raw tests/data/sources tests/data/text tests/data/test_images_fuzz.py \
	  tests/eval/test_calibration.py tests/artifacts/test_leases.py tests/registry/test_alias_register.py tests/pipeline \
	  tests/serve/app/test_limits.py tests/serve/app/test_fuzz.py tests/serve/router/test_sequential.py tests/infra/test_two_nodes.py \
	  tests/flows/full_pipeline/test_outages.py::test_flow_runs_outlive_an_outage_and_end_without_a_worker; \
	$(BIN)/python tests/faults/processors.py; \
	VILA_BENCH_SMALL=1 VILA_BENCH_MINUTES=5 $(BIN)/python benchmarks/soak.py

gpu: setup ## What a GPU can show, in parts of at most four minutes; VILA_BENCH_SMALL=1 runs them in small without one
	@$(BIN)/python benchmarks/gpu.py $(PARTS)

bench: setup ## Run one benchmark: make bench NAME=packing
	@if [ ! -f "benchmarks/$(NAME).py" ]; then \
	  echo "make bench NAME=..., one of:" $$(cd benchmarks && ls *.py 2>/dev/null | sed 's/\.py$$//') >&2; exit 2; fi
	@$(BIN)/python benchmarks/$(NAME).py

interop: setup ## Write the tables of docs/interop.md, which other programs and harnesses agree; ask an endpoint by other clients
	@$(BIN)/python docs/interop.py
	@$(BIN)/python docs/harnesses/run.py
	@$(BIN)/python docs/clients/run.py

docs: setup ## Build the documentation site into build/docs; any warning fails it
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	@echo "make docs: open build/docs/index.html"

settings: setup ## Write the tables of docs/settings.md: every setting
	@$(BIN)/python docs/settings.py

licences: setup ## Write the table of docs/licences.md: the licence of each package that an image installs
	@$(BIN)/python docs/licences.py

paper-scale: setup ## Write the tables of docs/paper-scale.md: the paper's recipes by the planner
	@$(BIN)/python docs/paper_scale.py

sbom: setup ## Write dist/sbom.cdx.json: what is installed in .venv, in CycloneDX's format
	@mkdir -p dist
	@$(UV) tool run --from cyclonedx-bom==$(CYCLONEDX_VERSION) cyclonedx-py environment --pyproject pyproject.toml \
	  --output-format JSON --output-file dist/sbom.cdx.json $(BIN)/python

release: setup ## Say what a release of this version lacks, and then the commands that make it
	@$(BIN)/python infra/release.py

format: setup ## Let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove caches and build outputs; .venv, store and data stay
	@rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find vila_ops flows tests -name __pycache__ -type d -prune -exec rm -rf {} +
