# make test | make demo | make .venv | make clean. A fresh clone needs Python 3.11 or later with pip, and make.
# Another interpreter: make test PYTHON=python3.12. More for pytest: make test PYTEST_ARGS='-k cache'.
PYTHON ?= python3
PYTEST_ARGS ?=

# The stamp is younger than what it depends on exactly when the environment is up to date.
STAMP := .venv/.stamp

.PHONY: .venv test demo clean

.venv: $(STAMP)

# torch comes first and pinned: an unpinned one is the newest build there is, with gigabytes of CUDA libraries.
# A CPU-only torch on Linux: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "flash-hf needs Python 3.11 or later, and '$(PYTHON)' is not: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

test: $(STAMP)
	.venv/bin/python -m ruff check .
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n 2 $(PYTEST_ARGS)

demo: $(STAMP)
	.venv/bin/python scripts/demo.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
