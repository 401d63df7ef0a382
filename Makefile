# Everything from a bare clone: each target does the set-up that it needs.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-hw test fuzz lint format lab bench bench-native survival matrix recordings readme picture page-pictures deb clean

PY := .venv/bin/python
SOURCE ?= auto
KERNEL ?=
MINUTES ?= 5
TIMES ?=
SEED ?=
FROM ?=
ARGS ?=

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## system packages and .venv, nothing else
	@sh tests/setup.sh

demo: setup ## memory fails under running VMs, by machine check; watch it live (SOURCE=auto|bpf|ftrace)
	@$(PY) -m tests.lab.demo --source $(SOURCE) $(ARGS)

demo-hw: setup ## memory errors reported by firmware on an arm64 host, from the error to the verdict
	@$(PY) -m tests.lab.demo_hw --source $(SOURCE) $(ARGS)

# Two at once, a file's tests by the same one: machines of the lab are mostly busy with one CPU. The
# lab's files come first, so that both end together. A machine whose kernel dies under emulation has
# one more try, which the closing line counts.
test: setup ## every test, those in the lab too (ARGS="-k name"; KVMTRACE_LAB=0: without the lab)
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --reruns 1 --only-rerun LabPanic -r fER $(ARGS)

fuzz: ## the laws of tests/property with fresh seeds (MINUTES=5; TIMES=n: so many times the examples of a test run; SEED=n: one seed once more)
	@sh tests/setup.sh --no-system
	@$(PY) -m tests.fuzz --minutes $(MINUTES) $(if $(TIMES),--times $(TIMES)) $(if $(SEED),--seed $(SEED)) $(if $(FROM),--from $(FROM)) $(ARGS)

lint: ## ruff and mypy
	@sh tests/setup.sh --no-system
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: ## let ruff reformat the tree
	@sh tests/setup.sh --no-system
	@$(PY) -m ruff format .

lab: setup ## a root shell in a machine of the lab (KERNEL=name, see tests/lab/kernels.toml)
	@$(PY) -m tests.lab shell $(if $(KERNEL),--kernel $(KERNEL)) $(ARGS)

bench: setup ## overhead, start time and memory, measured in the lab
	@$(PY) -m tests.lab.bench $(ARGS)

bench-native: ## costs that need no lab, in seconds (ARGS="scrapes snapshots": these parts; --readme: into docs/costs.md)
	@sh tests/setup.sh --no-system
	@$(PY) -m tests.bench $(ARGS)

survival: ## what serve's history survives, as a table (ARGS=--readme: into docs/service.md; --lab: on a booted host); root for a full disk
	@sh tests/setup.sh --no-system
	@$(PY) -m tests.survival $(ARGS)

matrix: setup ## every scenario on every kernel by every source, as a table
	@$(PY) -m tests.lab.matrix $(ARGS)

readme: ## README and docs/ anew: output of commands, tables of the last whole `make matrix` and `make bench`
	@sh tests/setup.sh --no-system
	@$(PY) -m tests.docs
	@$(PY) -m tests.lab.readme

picture: ## docs/top*.svg anew, from a recording: each size of `top`
	@sh tests/setup.sh --no-system
	@$(PY) -m tests.docs picture

page-pictures: ## docs/page-*.png and docs/incident-*.png anew, from a recording (needs Debian's chromium)
	@sh tests/setup.sh --no-system
	@$(PY) -m tests.page_pictures

# Debian's own Python builds it, not another one in PATH.
deb: ## build/kvmtrace_*_all.deb; needs what `apt build-dep ./` installs
	@rm -rf build/deb && mkdir -p build/deb/kvmtrace
	@git ls-files -z | tar --create --null --files-from=- | tar --extract --directory=build/deb/kvmtrace
	@cd build/deb/kvmtrace && env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME="$$HOME" dpkg-buildpackage -us -uc -b
	@mv build/deb/*.deb build/ && ls build/*.deb

clean: ## remove what was built (the lab's downloads stay: ~/.cache/kvmtrace-lab)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .venv
	find kvmtrace tests dashboards -name __pycache__ -prune -exec rm -rf {} +
