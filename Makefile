# SPDX-License-Identifier: Apache-2.0
# make demo and make test are all a newcomer needs; each sets up what it uses (tools/env.sh), a warm one in a second.
#   PYTHON=...     an environment that has torch is used as it is, without network; else the Python that makes .venv
#   KDK_BUILD=...  auto (default) | cpu | cuda | none: which compiled libraries to build
#   ARGS=...       passed on: make demo ARGS="--epochs 5", make test ARGS="-k cka -x"
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo demo-embeddings docs test test-quick fuzz machine lint resolve bench gpu wheel clean

export PYTHON KDK_BUILD
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

OUT ?= out
STAGE ?= all
# workers: on two cores two workers with one thread each beat one worker with two threads, the tests being small
JOBS ?= 2
ENV = python="$$(sh tools/env.sh $@)"
# without xdist the suite runs in one process. worksteal: the tests of a file stay on one worker, so that the other does
# not wait for what is built for them, or make it again
PYTEST = $(ENV) && jobs="$$("$$python" -c 'import xdist' 2>/dev/null && echo "-n $(JOBS) --dist worksteal" || true)" \
  && OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} "$$python" -m pytest $$jobs

help:
	@echo "make demo         train a student on real digits through these losses; prints a table, saves a plot"
	@echo "make demo-embeddings   a sentence-embedding model in 8 or 16 numbers a sentence, without labels; six minutes"
	@echo "make test         the whole test suite      make test-quick   the faster part of it"
	@echo "make docs         the site, into $(OUT)/docs, without network; a warning is an error"
	@echo "make fuzz         ops against formulas of the fuzzer's own, two minutes: ARGS=\"--seconds 3600\""
	@echo "make machine      all kernels as compiled for a GPU, executed on the CPU: an hour"
	@echo "make lint         ruff, house, types        make bench        measure this machine"
	@echo "make resolve      whether what make installs exists for every Python; needs the network, installs nothing"
	@echo "make gpu          certify and measure an NVIDIA GPU: OUT=dir STAGE=build|test|sanitize|bench|losses|all"
	@echo "make wheel        what a release uploads: the sdist and one wheel with both libraries, into dist/, checked"
	@echo "make clean        remove build products and .venv"

demo:
	@$(ENV) && exec "$$python" examples/distill.py $(ARGS)

demo-embeddings:
	@$(ENV) && exec "$$python" examples/distill_embeddings.py $(ARGS)

test:
	@$(PYTEST) $(ARGS)

test-quick:
	@$(PYTEST) -m "not slow and not demo and not compile_only" $(ARGS)

docs:
	@$(ENV) && "$$python" -m sphinx --fail-on-warning --keep-going --quiet -d $(OUT)/doctrees docs $(OUT)/docs \
	&& echo "$(OUT)/docs/index.html"

# ARGS="--case SEED" repeats a failure
fuzz:
	@python="$$(sh tools/env.sh test)" && exec "$$python" tests/fuzz.py $(ARGS)

# an hour on two cores. ARGS="mixup cka --architectures 80" for a part of it
machine:
	@python="$$(sh tools/env.sh test)" && export OMP_NUM_THREADS=1 && "$$python" tests/machine/contract.py $(ARGS) \
	&& "$$python" tests/machine/ranks.py long && "$$python" tests/machine/mutate.py

lint:
	@$(ENV) && "$$python" -m ruff check . && "$$python" -m ruff format --check . && "$$python" tools/house.py --check \
	&& "$$python" tools/typed.py

resolve:
	@$(ENV) && sh tools/resolve.sh "$$python"

bench:
	@$(ENV) && exec "$$python" -m bench run $(ARGS)

# PYTHON is taken as it is here: a GPU machine has its torch, and nothing is installed
gpu:
	@python="$(PYTHON)"; [ -n "$$python" ] || python="$$(sh tools/env.sh $@)"; \
	exec "$$python" bench/gpu.py --out "$(OUT)" --stage "$(STAGE)" $(if $(FORCE),--force)

# PYTHON is taken as it is here, too: a release builds where there is no torch but its headers
wheel:
	@python="$(PYTHON)"; [ -n "$$python" ] || python="$$(sh tools/env.sh $@)"; exec "$$python" tools/wheel.py build $(ARGS)

clean:
	rm -rf .venv build dist kdkernels/_lib *.egg-info .pytest_cache .ruff_cache .hypothesis
