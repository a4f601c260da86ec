# Two commands do everything: make quickstart, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The newest megatron-core that the plug-in is tested with, beside the one in requirements.txt. It asks for a newer
# Python than it needs, and lies in a folder of its own: tests/megatron/test_newest.py puts that first.
NEWEST := $(VENV)/megatron-core-0.19.2

# What builds the site is installed by `make docs` alone.
SITE := $(VENV)/.site

REQUIREMENTS := requirements.txt
# For `make test-torch`: the newest torch that setup.py accepts.
TORCH ?= 2.14.1

# Tests that need no torch, and where `make test-without-torch` installs what they need.
WITHOUT_TORCH := tests/config tests/data $(foreach name,dry_run slurm spec lock progress placement import_cost \
	liveness processes launch endings,tests/launchers/test_$(name).py) \
	$(foreach name,structure files words leftovers mistakes cli,tests/test_$(name).py)
BARE := build/without-torch-$(notdir $(PYTHON))

.PHONY: quickstart test test-torch test-without-torch lint bench docs gpu-check clean

quickstart: $(INSTALLED)
	$(BIN)/moesys launch configs/quickstart.yaml

test: $(INSTALLED) $(NEWEST)
	$(BIN)/pytest

# The whole suite with another torch, in a virtual environment of its own: make test-torch TORCH=2.14.1
test-torch: build/torch-$(TORCH)/requirements.txt
	$(MAKE) test VENV=$(<D) REQUIREMENTS=$<

# Each torch names the Triton and setuptools that it takes; from 70.1 on setuptools makes wheels by itself.
build/torch-%/requirements.txt: requirements.txt
	mkdir -p $(@D)
	sed -E -e 's/^torch==.*/torch==$*/' -e 's/^triton==[^;]*/triton/' -e 's/^setuptools==.*/setuptools>=70.1/' requirements.txt > $@

# What needs no torch, where there is none, with another Python: make test-without-torch PYTHON=python3.12
test-without-torch: $(BARE)/requirements.txt
	$(MAKE) $(BARE)/.installed VENV=$(BARE) REQUIREMENTS=$<
	$(BARE)/bin/pip install --quiet --disable-pip-version-check --no-deps megatron-core==0.16.1
	$(BARE)/bin/pytest $(WITHOUT_TORCH)

$(BARE)/requirements.txt: requirements.txt
	mkdir -p $(@D)
	grep -vE '^(torch|triton|ray|megatron-core|transformers)\b' requirements.txt > $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/lint-imports --config pyproject.toml
	$(BIN)/mypy -p moesys

bench: $(INSTALLED)
	$(BIN)/moesys bench train configs/quickstart.yaml

# Builds the site into build/site; a broken link or an undocumented public name fails.
docs: $(INSTALLED) $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

# Needs torch alone: where another Python has the right one, `python -m moesys.measure.gpu_check` does the same.
gpu-check: $(INSTALLED)
	$(BIN)/python -m moesys.measure.gpu_check

$(INSTALLED): $(REQUIREMENTS) setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement $(REQUIREMENTS)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(NEWEST): $(INSTALLED)
	rm -rf $@ $@.part
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--ignore-requires-python --python-version 3.12 --target $@.part megatron-core==0.19.2
	mv $@.part $@
	touch $@

$(SITE): docs/requirements.txt $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
