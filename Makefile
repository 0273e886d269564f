# make setup   everything into .venv, once
# make demo    fine-tune a small model on film reviews, on the CPU, in a few minutes
# make test    lint, types and all tests that need no GPU;  make quick: the fast part of it
# make bench   every figure that this project holds itself to, in one table; with a GPU, on it
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3,$(shell \
	$(name) -c 'import sys; print("$(name)") if (3, 11) <= sys.version_info[:2] <= (3, 12) else 0' \
	2>/dev/null)))
VENV := .venv
RUN := $(VENV)/bin/python
# Half of the tests' time is spent waiting for processes that start; a file's tests share engines,
# and tests/conftest.py has the files with slow ones begin.
TEST := $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
REQUIREMENTS := requirements.txt requirements-dev.txt requirements-demo.txt constraints.txt

.PHONY: setup demo test quick check bench

setup: $(VENV)/installed

demo: setup
	$(RUN) launch.py train configs/demo_lora.yaml

test: check
	$(TEST)

quick: check
	$(TEST) -m "not slow"

bench: setup
	$(RUN) -m benchmarks.bars

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: $(REQUIREMENTS)
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or 3.12 is needed" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "make: install Python's venv module, on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV): some 9 GB, three to five minutes"
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt \
		-r requirements.txt -r requirements-dev.txt
	$(RUN) -m pip install -qq --disable-pip-version-check --no-deps -r requirements-demo.txt
	touch $@
