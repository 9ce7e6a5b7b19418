# make reports   every table and figure, into reports/ (options: make reports ARGS="--profile smoke")
# make test      the tests, among them every assertion in the notebooks
# make clean     remove all that can be made again: environment, cache, leftovers
#
# The first use makes .venv with the versions of constraints.txt; another Python: make test PYTHON=python3.12

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# no question leaves this machine unless you say HF_HUB_OFFLINE=0 (for the gemma profile)
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE
export TOKENIZERS_PARALLELISM := false
export JUPYTER_PLATFORM_DIRS := 1

.PHONY: reports test clean

reports: .venv/reports.stamp
	$(BIN)/atm-sae reproduce $(ARGS)

test: export OMP_NUM_THREADS := 1
test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

clean:
	rm -rf .venv data/cache _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +

# PyTorch first and by itself: it is by far the largest, and so a machine may bring its own build of it
.venv/torch.stamp: constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or say where it is, make test PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	touch $@

.venv/reports.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) -e '.[reports]'
	touch $@

.venv/dev.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) -e '.[dev]'
	touch .venv/reports.stamp $@
