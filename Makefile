# Two commands: `make demo` and `make test`. Each makes .venv first, with the pinned set of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed-docs
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off --constraint constraints.txt
OUTPUT ?= demo

.PHONY: demo test test-slow wheel lint docs format bench clean help

help:
	@echo "make demo       set up, then the whole chain on the French sample, into $(OUTPUT)/ (about six minutes)"
	@echo "make test       set up, then the test suite"
	@echo "make test-slow  the tests that take minutes (twenty kills, Ray, inductor)"
	@echo "make wheel      build the wheel, install it in a fresh environment elsewhere, run a tiny demo there"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make docs       set up, then the documentation's site, strictly, into build/site/"
	@echo "make bench      every benchmark; results go to bench/, scripts/publish.py puts them on the pages"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FAT5 needs Python 3.11 or newer; say which with `make PYTHON=python3.11 …`")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/fat5 demo --output_dir $(OUTPUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 4 --dist loadfile -q --timeout 300

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -q

wheel:
	rm -rf build
	$(PYTHON) scripts/try_wheel.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED_DOCS): $(INSTALLED)
	$(INSTALL) --editable '.[dev,docs]'
	touch $@

# Not --quiet: strict counts the warnings that it would silence.
docs: $(INSTALLED_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	for file in benchmarks/*.py; do case $$file in */measure.py|*/gpu_*|*/finetuning_turns.py|*/reliability.py) ;; *) $(BIN)/python $$file || exit 1 ;; esac; done

clean:
	rm -rf $(VENV) demo build dist
