# Each target sets up .venv on a fresh machine (python3 with pip and venv) and then does its work.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow check bench lock clean

demo: $(READY)
	$(BIN)/python -m ray_jobs.demo

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The service's own measures, an hour and a half. Left out: benchmarks.houses, which takes longer alone,
# and benchmarks.chaos, 50 minutes, which mounts a small disk as root.
bench: $(READY)
	for name in feed wait memory join interrupted order loop checkpoint startup tuning pbt plan; do \
		$(BIN)/python -m benchmarks.$$name || exit 1; done

# After a change of dependencies: the newest versions that fit, for every Python and platform.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --upgrade --no-header \
		--no-annotate --quiet --output-file requirements-dev.lock
	$(BIN)/uv pip compile pyproject.toml --constraint requirements-dev.lock --universal --no-header \
		--no-annotate --quiet --output-file requirements.lock

# pip compiles on one core, and that takes as long as all else.
$(READY): requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements-dev.lock
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) demo runs
