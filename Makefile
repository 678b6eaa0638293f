# Two commands on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
# Another interpreter (3.11 or 3.12): make demo PYTHON=/path/to/python3.12. Arguments for pytest: make test-unit ARGS="-k index"
PYTHON ?= python3.11
ARGS ?=
SECONDS ?= 60
ONLY ?=

VENV := .venv
# The environment is renewed when one of these changes: the stamp's name is their hash.
MADE_FROM := pyproject.toml packaging/make-venv packaging/constraints-cpu.txt packaging/fbgemm-gpu-stub/pyproject.toml
STAMP := $(VENV)/.installed-$(firstword $(shell cat $(MADE_FROM) | cksum))
# The `timeout` ends a test whose workers wait for each other for ever.
PYTEST := $(VENV)/bin/python -m pytest --timeout 900 --durations 10

.PHONY: help venv demo smoke test test-unit test-fuzz fuzz test-two-process test-end-to-end test-faults test-cluster \
	test-gpu test-real-logs faults soak bench peers lint clean

help:
	@echo "make venv              the environment .venv; every target below makes it where it needs it"
	@echo "make demo              train, index and measure on the synthetic world, two workers (configs/demo.yaml)"
	@echo "make smoke             the same in small, with a quality gate (configs/smoke.yaml)"
	@echo "make test              unit, fuzz, two-process, end-to-end and fault tests; each also: test-unit, test-fuzz, .."
	@echo "make test-cluster      runs over two and three Ray nodes, a lost node, a lost head, a straggler (ten minutes)"
	@echo "make test-gpu          the same parts on one GPU, in an environment of yours with CUDA: PYTEST='python -m pytest'"
	@echo "make test-real-logs    tests on the logs in the folder that WATCHTOWER_REAL_LOGS names"
	@echo "make fuzz              every reader against changed files, guided by coverage; SECONDS=60 of each, ONLY=config,logs"
	@echo "make faults            100 seeded kills, a full disk, damaged files, a lost node: survived N of N (an hour or more)"
	@echo "make soak              200 tiny epochs in one process tree: memory, files, threads, shared memory must be flat"
	@echo "make bench             every part beside its peer or its limit (BENCHMARKS.md); ARGS='--only swing replay' some"
	@echo "make peers             benchmarks/.venv-peers, which make bench makes by itself"
	@echo "make lint              ruff and yamllint"
	@echo "make clean             remove runs/, caches, .venv-fuzz and fuzz-findings/; .venv stays"

venv: $(STAMP)

$(STAMP):
	@MAKE_GOAL="$(firstword $(MAKECMDGOALS))" packaging/make-venv "$(PYTHON)" "$(STAMP)"

demo: $(STAMP)
	$(VENV)/bin/watchtower run configs/demo.yaml run_dir=runs/demo

# From nothing every time: a run that is already there would only be looked at.
smoke: $(STAMP)
	rm -rf runs/smoke
	$(VENV)/bin/watchtower run configs/smoke.yaml run_dir=runs/smoke

test: $(STAMP)
	$(PYTEST) tests/unit tests/fuzz tests/two_process tests/end_to_end tests/faults $(ARGS)

test-unit: $(STAMP)
	$(PYTEST) tests/unit $(ARGS)

test-fuzz: $(STAMP)
	$(PYTEST) tests/fuzz $(ARGS)

# atheris lives in an environment of its own, which sees the packages of .venv.
fuzz: $(STAMP)
	test -x .venv-fuzz/bin/python || $(VENV)/bin/python -m venv .venv-fuzz
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(.venv-fuzz/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/watchtower.pth"
	.venv-fuzz/bin/python -c "import atheris" 2>/dev/null || .venv-fuzz/bin/python -m pip install --quiet atheris
	PYTHONPATH="$(CURDIR)" .venv-fuzz/bin/python tests/fuzz/long_run.py --seconds $(SECONDS) --only "$(ONLY)" $(ARGS)

test-two-process: $(STAMP)
	$(PYTEST) tests/two_process $(ARGS)

test-end-to-end: $(STAMP)
	$(PYTEST) tests/end_to_end $(ARGS)

test-faults: $(STAMP)
	$(PYTEST) tests/faults $(ARGS)

# Not part of `make test`. As root some also run in networks of their own.
test-cluster: $(STAMP)
	$(PYTEST) tests/cluster $(ARGS)

# Not part of `make test`, and not in .venv, which has no CUDA.
test-gpu:
	$(PYTEST) tests/gpu $(ARGS)

test-real-logs: $(STAMP)
	$(PYTEST) tests/real_logs $(ARGS)

faults: $(STAMP)
	$(VENV)/bin/python tests/faults/survive.py $(ARGS)

soak: $(STAMP)
	$(VENV)/bin/python tests/faults/soak.py $(ARGS)

bench: $(STAMP)
	benchmarks/make-peers "$(VENV)/bin/python" || echo "make bench: without the peers; their rows are left out" >&2
	$(VENV)/bin/python benchmarks/run_all.py $(ARGS)

# What benchmarks are held against and does not fit into .venv.
peers: $(STAMP)
	benchmarks/make-peers "$(VENV)/bin/python"

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/yamllint --strict configs docker

clean:
	rm -rf runs build fuzz-findings .venv-fuzz .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
