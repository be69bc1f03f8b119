# Each target first creates .venv if needed, which takes only python3 with pip and venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: venv demo test test-slow check bench lock clean

venv: $(READY)

demo: $(READY)
	$(BIN)/python -m ray_jobs.demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# Benchmarks of the service, 90 minutes in total. Not included: comparisons of models, which take up to
# hours (houses, cross_validation, ham10000, text), and benchmarks.chaos (50 minutes), which mounts a
# small disk as root.
bench: $(READY)
	for name in feed wait memory join interrupted order loop checkpoint startup scale tuning pbt plan \
			report; do \
		$(BIN)/python -m benchmarks.$$name || exit 1; done

# After a change of dependencies: pin the newest compatible versions for every Python and platform.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --upgrade --no-header \
		--no-annotate --quiet --output-file requirements-dev.lock
	$(BIN)/uv pip compile pyproject.toml --extra hub --extra serve --extra weights \
		--constraint requirements-dev.lock --universal --no-header \
		--no-annotate --quiet --output-file requirements.lock

# pip compiles bytecode on one core, which takes as long as the rest of the installation.
$(READY): requirements-dev.lock pyproject.toml
	@echo "installing into $(VENV), which takes about 3 minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements-dev.lock
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) demo runs
