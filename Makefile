# Two commands do everything: `make demo` and `make test`. Both go through `make setup`, which installs into .venv and
# does nothing when that is current.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo test lint clean

setup: $(INSTALLED)

# torch first and by itself: a looser requirement would pull another build of it. Last, the operator that DeepSpeed
# would compile when the first run on a CPU starts.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, none was found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into .venv (minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >/dev/null
	@touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed launch/sft.py recipes/pocket/pocket.yaml --overwrite
	@echo "Report: eval/outputs/pocket/latest/report.html"

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
