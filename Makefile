# Each target sets up what it needs; PYTHON=... names the Python to start from.
PYTHON ?= python3
ARGS ?=
SETUP = $(PYTHON) scripts/setup.py

.DEFAULT_GOAL := help
.PHONY: help demo test bench docs lint format wheel check-kernels hooks clean

help:
	@echo "make demo    train and compare on small data; ARGS='...' goes to 'contaccum demo'"
	@echo "make test    run the tests side by side; ARGS='...' goes to pytest (-n 0: one by one)"
	@echo "make bench   run the benchmarks; ARGS='...' goes to them"
	@echo "make docs    build the documentation into build/site"
	@echo "make lint    check formats and types;  make format  repairs formats"
	@echo "make wheel   build dist/*.whl and check it;  make hooks  installs the git hook"
	@echo "make check-kernels   check registers and spills of the CUDA kernels; no GPU needed"
	@echo "make clean   remove what was built (.venv stays)"

demo:
	@$(SETUP) --extra train contaccum demo $(ARGS)

test:
	@$(SETUP) --extra test python -m pytest -q -n auto --maxprocesses 4 python_tests $(ARGS)

bench:
	@$(SETUP) --extra bench python -m benchmarks $(ARGS)

docs:
	@$(SETUP) --extra dev --extra docs mkdocs build --strict $(ARGS)

lint:
	@$(SETUP) --extra dev --extra test python scripts/lint.py

format:
	@$(SETUP) --extra dev --extra test python scripts/lint.py --fix ruff clang-format

# setuptools copies from build/lib* whatever an earlier build left there.
wheel:
	rm -rf build/lib* build/bdist* dist
	@$(SETUP) python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@$(SETUP) python scripts/check_wheel.py dist/*.whl

# Asks for nothing but Python's standard library and nvcc.
check-kernels:
	@$(PYTHON) scripts/check_kernels.py $(ARGS)

hooks:
	@$(SETUP) --extra dev --extra test pre-commit install

clean:
	rm -rf build dist *.egg-info contaccum_ext/_C*.so
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
