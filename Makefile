# `make demo` and `make test` do all of the set-up they need.
# PYTHON=python3.12 picks the interpreter, TORCH_INDEX=... where torch comes from, ARGS="..." goes to the command at the end.
SHELL := /bin/sh
PY := .venv/bin/python
export PYTHON TORCH_INDEX GPU_PYTHON GPU_VENV

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench chaos services lock gpu gpu-rehearsal

help: ## What can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: ## Virtual environment, pinned packages, FFCV; nothing to do the second time
	@sh scripts/setup.sh scripts.bootstrap

demo: setup ## The main job: SBS over real images at several lambdas, to a Pareto table (minutes on 2 cores)
	@$(PY) -m sweeps run sweeps/spaces/digits_resnet20.toml $(ARGS)

test: setup ## The tests; what needs a missing service is skipped
	@$(PY) -m pytest $(ARGS)

lint: setup ## ruff, import directions, types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@.venv/bin/lint-imports --no-logo
	@$(PY) -m mypy

bench: setup ## Figures beside their limits; ends with 1 when one is missed (ARGS="names" for some)
	@$(PY) -m tests.benchmarks $(ARGS)

N ?= 20
chaos: setup ## Kill training runs at random moments, N=20 times; ends with 1 unless all go on as if nothing had been
	@$(PY) -m tests.chaos --kills $(N) $(ARGS)

gpu: setup ## What a bare machine with a GPU lacks, into .gpu, and how to prove the project there (docs/gpu.md)
	@$(PY) -m scripts.gpu.prepare

gpu-rehearsal: gpu ## The same on this machine's CPU, in an environment like that of the bare machine (GPU_VENV=... says where)
	@$(PY) -m scripts.gpu.rehearse $(ARGS)

services: ## Daemons for the tests that want them: SLURM, PostgreSQL, Chromium (Debian, root or sudo); starts none
	@sh scripts/setup.sh scripts.services

lock: setup ## Write constraints.txt anew from .venv, for maintainers after a change of versions
	@sh scripts/lock.sh
