# Two commands do everything: `make demo` and `make test`. Both build their own .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-slow lint ui install bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ui,dev]'
	touch $@

demo: install
	$(BIN)/spectral-diffusion demo -o demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

ui: install
	$(BIN)/spectral-diffusion ui

bench: install
	for one in layers step spectrum fuse gradient regions methods; do $(BIN)/python benchmarks/$$one.py || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info
