.DEFAULT_GOAL := help
.PHONY: help setup demo test lint crash soak fuzz audit bench bench-compare picture clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST)

setup:  ## install what is missing: PostgreSQL with wal2json, and the Python packages into .venv
	@scripts/setup

demo: setup  ## the whole thing on this machine, with throwaway servers (ARGS="...": options of bridge demo)
	@.venv/bin/python -m bridge demo $(ARGS)

test:  ## lint and all tests, on real servers (ARGS="-k snapshot -x": only pytest, with these arguments)
	@scripts/setup --tests
	@scripts/test $(ARGS)

lint: setup  ## ruff and mypy
	@scripts/lint

crash:  ## kill, cut and pause everything at random, and compare (WHAT=index ENGINE=… or WHAT=altering, SEEDS=n, SEED=the first, JOBS=at a time)
	@scripts/setup --tests
	@.venv/bin/python -m tests.$(or $(filter altering,$(WHAT)),crash$(if $(filter index,$(WHAT)),_index)) $(if $(SEEDS),--seeds $(SEEDS)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS)) $(if $(ENGINE),--engine $(ENGINE))

soak:  ## load and faults for long, and what grows meanwhile (MINUTES=60 SEED=n ENGINE=… REPORT=file)
	@scripts/setup --tests
	@.venv/bin/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) \
	  $(if $(ENGINE),--engine $(ENGINE)) $(if $(REPORT),--report $(REPORT))

fuzz:  ## bytes changed at random against every parser of outside bytes (MINUTES=5 for all, TARGET=one of them, SEED=n)
	@scripts/setup
	@.venv/bin/python -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(if $(TARGET),--target $(TARGET)) \
	  $(if $(SEED),--seed $(SEED))

audit: setup  ## known vulnerabilities of the Python packages in .venv (ARGS="...": options of pip-audit)
	@scripts/audit $(ARGS)

bench:  ## measure and compare with the budgets (ONLY=stream,latency JSON=file SCALE=0.1 RUNS=3)
	@scripts/setup --tests
	@.venv/bin/python -m bench $(if $(ONLY),--only $(ONLY)) $(if $(JSON),--json $(JSON)) $(if $(SCALE),--scale $(SCALE)) \
	  $(if $(RUNS),--runs $(RUNS))

bench-compare: setup  ## two results of make bench JSON=file side by side (A=file B=file)
	@.venv/bin/python -m bench.compare $(A) $(B)

picture:  ## take docs/page.png anew
	@scripts/setup --tests
	@.venv/bin/python -m tests.picture docs/page.png

clean:  ## remove .venv, caches and builds
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
