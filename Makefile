# Two commands do everything: `make demo` and `make test`. Both build their own .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Packages that quantize load with everything else where they are installed, so only their tests get them.
QUANTIZERS := $(VENV)/quantizers

# Several test processes share the cores; threads inside them would only wait for each other.
ONE := OMP_NUM_THREADS=1
# Where there is a Chromium, its quick tests run too: in a process of their own, since they keep an event loop running.
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: demo test test-ui test-slow lint ui install dist docs bench gpu-check evidence pocket-gpu-piece clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ui,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(QUANTIZERS) torchao bitsandbytes
	touch $@

demo: install
	$(BIN)/spectral-diffusion demo -o demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(ONE) $(BIN)/python -m pytest -n auto --maxprocesses 4
	$(ONE) PYTHONPATH=$(QUANTIZERS) $(BIN)/python -m pytest -n auto --maxprocesses 4 tests/test_quantized.py
ifneq ($(CHROMIUM),)
	$(ONE) $(BIN)/python -m pytest -m "browser and not slow" tests/browser
endif

test-ui: install
	$(ONE) $(BIN)/python -m pytest -n 2 -m browser tests/browser

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

ui: install
	$(BIN)/spectral-diffusion ui

# The sdist and the wheel in dist/, and a picture by the wheel alone in an environment of its own.
dist: install
	$(BIN)/python -m tools.dist --outdir dist

# The site in site/.
docs: install
	$(BIN)/mkdocs build --strict

bench: install
	for one in layers step spectrum fuse gradient regions methods memory trainer app; do $(BIN)/python benchmarks/$$one.py || exit 1; done

# What a GPU does with all of this, as a page for docs/gpu/: at most eight minutes, no internet. See docs/gpu/README.md.
gpu-check: install
	$(BIN)/python benchmarks/gpu_check.py $(GPU_ARGS)

evidence: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plots]'
	$(BIN)/spectral-diffusion experiment all -o docs/evidence

# One piece of the pocket base's pretraining on a machine with a GPU: see docs/pocket.md. Needs no internet.
POCKET_WORK ?= pretraining/gpu
POCKET_OUT  ?= packed
POCKET_ARGS ?=
pocket-gpu-piece:
	$(PYTHON) -m tools.pocket gpu --work $(POCKET_WORK) --start $(POCKET_WORK)/packed -o $(POCKET_OUT) $(POCKET_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
