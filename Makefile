# make test | make demo | make cards | make oldest | make .venv | make clean. A fresh clone needs Python 3.11 or later
# with pip, and make.
# Another interpreter: make test PYTHON=python3.12. More for pytest: make test PYTEST_ARGS='-k cache'.
PYTHON ?= python3
PYTEST_ARGS ?=

# Some containers forbid Python to keep what it has compiled: every process of the tests would then compile anew all that
# it imports, for half a minute.
export PYTHONDONTWRITEBYTECODE :=
# Python warns of text files opened in the encoding of the locale, and setup.cfg makes that an error.
export PYTHONWARNDEFAULTENCODING := 1

# The stamp is younger than what it depends on exactly when the environment is up to date.
STAMP := .venv/.stamp

.PHONY: .venv test demo cards oldest clean

.venv: $(STAMP)

# pip first: the one that comes with Python 3.11 takes twice the time to choose among wheels.
# Without compiling: most of what is installed is never imported, and Python compiles the rest when it is.
# torch comes first and pinned: an unpinned one is the newest build there is, with gigabytes of CUDA libraries.
# A CPU-only torch on Linux: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "flash-hf needs Python 3.11 or later, and '$(PYTHON)' is not: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt pip
	.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt torch==2.13.0
	.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	@touch $@

test: $(STAMP)
	.venv/bin/python -m ruff check .
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

demo: $(STAMP)
	.venv/bin/python scripts/demo.py

# After a change of results: the cards in model_cards/ are made from them.
cards: $(STAMP)
	HF_HUB_OFFLINE=1 .venv/bin/python scripts/make_card.py --published

# The contracts with the oldest transformers that setup.cfg allows, in an environment of its own. pip chooses anew what
# goes with that version.
OLDEST := 5.17.0
CONTRACTS := $(addprefix tests/test_,configuration.py documents.py ecosystem.py export.py finetuning.py generation.py \
	heads.py hub.py loss.py modeling.py peft.py recipes.py remote_code.py security.py streaming.py training.py \
	trl.py)

oldest: .venv-oldest/.stamp
	HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal $(CONTRACTS) $(PYTEST_ARGS)

.venv-oldest/.stamp: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^(transformers|huggingface_hub|hf-xet|httpcore2|httpx2|tokenizers|accelerate|peft|trl)==' constraints.txt \
		> .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --no-compile -c .venv-oldest/constraints.txt pip
	.venv-oldest/bin/python -m pip install --quiet --no-compile -c .venv-oldest/constraints.txt torch==2.13.0
	.venv-oldest/bin/python -m pip install --quiet --no-compile -c .venv-oldest/constraints.txt transformers==$(OLDEST) -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
