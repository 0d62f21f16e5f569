# Every target does all the set-up on a fresh machine: a virtual environment and the packages.
PYTHON ?= python3
RUN := .venv/bin/python
# Spinning OpenMP threads make small steps many times slower when anything else is running.
export OMP_WAIT_POLICY ?= PASSIVE

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo model read test check lint format
demo: .venv/ready
	$(RUN) -m experiments.demo

# datasets/shapes_code.pt, in an hour and a half of two slow cores.
model: .venv/ready
	$(RUN) -m experiments.shapes_model --out datasets/shapes_code.pt

# docs/read.html from the training that `make model` leaves in out/shapes_model.
read: .venv/ready
	$(RUN) -m docs.book.build

test: .venv/ready
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What a contributor runs after every change: style and the fast tests; two minutes of slow cores.
check: lint
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
