# Two commands: `make run` walks the whole way on the built-in data set, `make test` proves that it is right.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: run test test-long test-newest bench docs lint clean

run: .venv/installed .dvc/config
	dvc repro
	@mgd-pipeline evaluate --last
	@echo "all of it on one page: $(CURDIR)/data/results/report.html"

# Two processes: most tests use one core each. The tests of one module stay together, they share what is costly to make.
# A process that dies ends the run: pytest-xdist would wait for ever for the tests that it had.
test: .venv/tools lint
	pytest --numprocesses 2 --dist loadfile --max-worker-restart 0

# The proofs with large counts: kills, faults, flipped bits, readers during builds. About ten minutes.
test-long: .venv/tools
	pytest --long --timeout 7200 tests/test_cache_build.py tests/test_cache_damage.py tests/test_cache_tools.py tests/test_weights.py \
		tests/test_resume.py

# Teacher caches that this environment and the newest one (zarr, numpy, pyarrow, ...) write, grow and read for each other, also by
# xarray, Dask, zarrs and tensorstore. Warnings of the newest are errors. make test-newest NEWEST=/path/to/python3.12 [ZARR=zarr==3.1.0]
NEWEST ?= $(PYTHON)
ZARR ?= zarr>=3.1
IN_NEWEST := PYTHONPATH=pipeline build/newest/venv/bin/python -W error
test-newest: .venv/tools
	@rm -rf build/newest && mkdir -p build/newest
	$(NEWEST) -m venv build/newest/venv
	build/newest/venv/bin/python -m pip install --quiet --upgrade '$(ZARR)' xarray 'dask[array]' zarrs tensorstore \
		pyarrow google-crc32c pydantic ruamel.yaml pillow pytest
	python tests/newest/make_cache.py build/newest/here 5
	$(IN_NEWEST) tests/newest/make_cache.py build/newest/here 14
	$(IN_NEWEST) tests/newest/make_cache.py build/newest/there 5
	python tests/newest/make_cache.py build/newest/there 14
	for made in here there; do for python in python '$(IN_NEWEST)'; do \
		env $$python tests/newest/read_cache.py build/newest/$$made || exit 1; done; done

# Every figure of docs/benchmarks.md, in 13 minutes on 2 idle cores. The newest zarr is measured in an environment of its own:
# make bench NEWEST=/path/to/python3.12
bench: .venv/installed
	@$(INSTALL) '.[bench,cluster]'
	python benchmarks/report.py --newest $(NEWEST)

# The documentation site, from README.md and docs/, into build/site; `mkdocs serve` shows it while you write.
docs: .venv/tools
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict  # without the theme's notice about its successor

lint: .venv/tools
	ruff check pipeline stages tests benchmarks docs examples
	ruff format --check pipeline stages tests benchmarks docs examples
	pyright

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mgd-pipeline needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: one to three minutes the first time"
	@$(INSTALL) '.[dvc]'
	@touch $@

# What tests, lint and documentation need beyond a run.
.venv/tools: .venv/installed
	@echo "installing what tests need as well: half a minute the first time"
	@$(INSTALL) '.[dvc,dev]'
	@touch $@

clean:
	rm -rf .venv build data/labels data/manifest data/raw data/teachers data/targets data/students data/results .mgd
