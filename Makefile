# For those who change the code. Each target sets up what it needs first; CONTRIBUTING.md says when to run which.
.DEFAULT_GOAL := help
.PHONY: help setup quick checks format test nightly lock slurm-test
PYTHON_OF_VENV := .venv/bin/python
SHELL_SCRIPTS := $(wildcard *.sh */*.sh) .ci/run stages/submit.slurm

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

setup:
	@DEVICE=$${DEVICE:-cpu} bash tools/setup_environment.sh --without-sglang

quick: setup ## under a minute, without the SGLang server: objective, configuration, stage outputs, data
	OMP_NUM_THREADS=1 $(PYTHON_OF_VENV) -m pytest -q -m quick --durations=5 $$($(PYTHON_OF_VENV) tests/markers.py quick)

checks: setup ## style, types, spelling, shell scripts, imports between rooms, published numbers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/codespell
	.venv/bin/shellcheck $(SHELL_SCRIPTS)
	$(PYTHON_OF_VENV) -m tools.publish_numbers --check

format: setup ## writes what ruff can mend by itself
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

test: ## every test but the nightly ones, as CI runs them (about 30 minutes on two cores)
	bash tests/run.sh

lock: setup ## requirements-sglang-cuda.txt anew: what requirements-sglang.txt asks for, with all it needs, pinned
	bash tools/lock_server.sh

nightly: ## what is too long for CI
	bash tests/run.sh -n 0 -m nightly

slurm-test: setup ## stages/submit.slurm on a SLURM of its own: three nodes on this machine (some minutes; as root)
	@$(PYTHON_OF_VENV) -m tests.slurm.cluster
	bash tests/run.sh -n 0 -m nightly tests/slurm
