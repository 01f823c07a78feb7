# Everything sets itself up: each target first runs setup_cluster.sh, which is quick when nothing changed.

VENV := $(shell ./setup_cluster.sh --print-venv)
# One thread each: torch processes that take every core slow each other down, and a login node is shared. Two workers compute; the
# others begin with the tests that wait for SLURM (tests/scheduling.py).
WORKERS ?= 4
PYTEST = OMP_NUM_THREADS=1 "$(VENV)/bin/python" -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help setup setup-dev demo test check bench clean

help:
	@echo "make demo    set up, then run the calibration pipeline on the built-in model (results/demo/)"
	@echo "make test    set up, then run the tests (TESTS=tests/core for a part)"
	@echo "make check   make test, after ruff and mypy"
	@echo "make bench   set up, then run the benchmarks"
	@echo "make setup   set up only (see ./setup_cluster.sh --help)"
	@echo "make clean   remove caches; .venv/, checkpoints/ and results/ stay"

setup:
	@./setup_cluster.sh

setup-dev:
	@./setup_cluster.sh --dev

demo: setup
	@"$(VENV)/bin/tribunal" demo

test: setup-dev
	$(PYTEST) $(TESTS)

check: setup-dev
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/mypy"
	$(PYTEST) $(TESTS)

bench: setup
	@for file in benchmarks/[a-z]*.py; do \
	    name=$$(basename "$$file" .py); echo "== $$name"; "$(VENV)/bin/python" -m benchmarks.$$name || exit 1; \
	done

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
