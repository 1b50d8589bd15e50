# make demo and make test do all of their set-up themselves: python3 (3.10 to 3.12, with venv) is enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
FOLDERS := backends configs convert models scripts serving

# A build of torch brings the Triton that it is made for; this is another than the suite's.
TRITON ?= 3.9.0
CHIPS  := sm_80 sm_90 sm_100 gfx942 gfx950

.PHONY: demo test test-launch test-mindspore test-triton lint links bench clean

demo: $(VENV)/.demo
	$(BIN)/deepspan demo

# One thread a worker: OpenMP threads that share a core spin while they wait for each other.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Apart from the suite: the launches of torchrun that take long or damage something.
test-launch: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m launch tests/parallel

# Apart from the suite, too: MindSpore is most of a gigabyte, compiles for minutes, and its launches use network ports.
test-mindspore: $(VENV)/.mindspore
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/backends_mindspore tests/contract tests/cli/test_machine.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m launch tests/backends_mindspore

# Whether all kernels compile with another Triton, for every chip: a quarter of an hour, no GPU.
test-triton: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/triton triton==$(TRITON)
	for chip in $(CHIPS); do PYTHONPATH=build/triton:. $(BIN)/python tests/kernels/compile_for.py $$chip || exit; done

lint: $(VENV)/.dev links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p deepspan

bench: $(VENV)/.dev
	$(BIN)/python scripts/bench_cpu.py

# A link tree for type checkers and for air-gapped use: PYTHONPATH=build/links python -m deepspan.scripts.cli
links:
	mkdir -p build/links/deepspan
	for folder in $(FOLDERS); do ln -sfn ../../../$$folder build/links/deepspan/$$folder; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[torch]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[torch,speed,dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.mindspore: $(VENV)/.dev
	$(PIP) --editable '.[torch,mindspore,speed,dev]'
	touch $@

clean:
	rm -rf build dist output $(VENV)
