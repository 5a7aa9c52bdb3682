# make demo   the main job, end to end, on this machine        make test   the whole suite
# make lint   ruff, and mypy (strict) on the installed wheel   make bench  the figures of the README
# make bench-gpu   kernels, programs and predictions on a GPU, into gpu-results/ (docs/measuring.md)
# make bench-serve   another project's benchmark client against `mnemoc serve` (docs/clients.md)
# make browser   Debian's Chromium where there is none: the tests of report.html drive it
#
# Everything is installed into .venv as a wheel, never the source tree: a file that the wheel lacks
# shows here. A second run installs again only what has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
PACKAGES := ir planner codegen runtime
SOURCES := pyproject.toml README.md py.typed $(wildcard *.py) \
	$(shell find $(PACKAGES) -name '*.py' -o -name '*.j2' -o -name '*.json' -o -name '*.toml')

MNEMOC := $(BIN)/mnemoc

.PHONY: demo test browser bench bench-gpu bench-serve lint clean

demo: $(VENV)/installed
	rm -rf demo
	$(MNEMOC) init-model tiny-llama demo/model --seed 1 --max-shard-size 4M
	$(MNEMOC) calibrate --cpu -o demo/local.toml
	$(MNEMOC) plan demo/model --cluster demo/local.toml --gpus 2 --layout spp=2 \
		--context 16K --output-tokens 64 --ttft 60s --tbt 500ms -o demo/plan
	$(MNEMOC) show demo/plan kernel rms_norm
	$(MNEMOC) verify demo/plan --weights demo/model
	$(MNEMOC) run demo/plan --weights demo/model --prompt-file README.md --max-tokens 32
	$(MNEMOC) simulate demo/plan --workload sharegpt --qps 0.2 --duration 5min --skip-unservable

# two files at a time, and one thread to each
test: $(VENV)/installed $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST)

browser:
	@if ! command -v chromium >/dev/null; then \
		if [ "$$(id -u)" = 0 ]; then run=; else run=sudo; fi; \
		$$run apt-get update -q && $$run apt-get install -y -q --no-install-recommends chromium; \
	fi

bench: $(VENV)/installed $(VENV)/dev
	$(BIN)/python -m benchmarks.cpu_kernels
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python -m benchmarks.kvp
	$(BIN)/python -m benchmarks.predictions
	$(BIN)/python -m benchmarks.long_context
	$(BIN)/python -m benchmarks.under_load
	$(BIN)/python -m benchmarks.kills
	$(BIN)/python -m benchmarks.convoy
	$(BIN)/python -m benchmarks.simulated
	$(BIN)/python -m benchmarks.forecast
	$(BIN)/python -m benchmarks.scheduling

# the checkout itself, with whatever python3 has torch and triton: nothing is installed
bench-gpu:
	$(PYTHON) -m benchmarks.gpu --out gpu-results

bench-serve: $(VENV)/installed $(VENV)-client/installed
	$(BIN)/python -m benchmarks.serving.clients guidellm=$(VENV)-client/bin/guidellm

lint: $(VENV)/installed $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/python -m mypy --config-file ../pyproject.toml -p mnemoc

clean:
	rm -rf $(VENV) $(VENV)-client demo gpu-results build *.egg-info

# torch first: its build (CPU or CUDA) is the choice of pip's configuration, not ours
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch==2.13.0
	touch $@

# `build` would keep files that the tree no longer has
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	rm -rf build
	$(PIP) .
	rm -rf build *.egg-info
	touch $@

# a client has its own environment: what it wants of transformers and others is not what we want
$(VENV)-client/installed:
	$(PYTHON) -m venv $(VENV)-client
	$(VENV)-client/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-client/bin/python -m pip install --quiet guidellm==0.8.1
	touch $@

$(VENV)/dev: pyproject.toml | $(VENV)/installed
	$(PIP) '.[dev]'
	rm -rf build *.egg-info
	touch $@
