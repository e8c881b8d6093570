# `make help` lists what there is. Every recipe works on a fresh Debian 12 machine as root.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
# Bytecode is kept, whatever the environment says: each process of the tests would compile all of it for seconds.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PYTHON := $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest -q
# What other clones use as well.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/probefleet
CLUSTER := tests/cluster/cluster
# Linux 5.10, 6.1, 6.12 and the newest. `make test` boots one of those that docs/kernels.md has whole, each day another.
KERNELS := bullseye bookworm bookworm-backports sid
# Pure modules: their branch coverage is held at 95 %, each by itself.
PURE := $(addprefix probefleet_core.,policy planner placement aggregate report) \
	$(addprefix probefleet_wire.,columns merge) $(addprefix probefleet_agent.,reconcile decode samples pods baseline)
PURE_TESTS := $(patsubst %,tests/unit/test_%.py,aggregate baseline collect columns decode departed foreign_pods map_plans \
	merge placement planner pods policy prints reconcile report samples)
OTHER_TESTS = $(PYTEST) -n $(WORKERS) tests/unit $(addprefix --ignore=,$(PURE_TESTS))
# One more than there are CPUs: some tests wait.
WORKERS := $(shell cpus=$$(nproc); echo $$((cpus < 4 ? cpus + 1 : 4)))
TEST_PACKAGES := packages.txt $(wildcard tests/*/packages.txt) images/packages.txt

# Install what is missing of the Debian packages in these files.
define apt_install
@missing=$$(for package in $$(grep -hv '^ *#' $(1) | sort -u); do \
	dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || echo $$package; done); \
if [ -n "$$missing" ]; then \
	echo "installing Debian packages:" $$missing; \
	apt-get update -qq; \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >build/apt.log 2>&1 \
		|| { tail -20 build/apt.log >&2; exit 1; }; \
fi
endef

# Run pytest in some way; what fails, once more. A test that fails twice in a row has failed: what a busy machine delays
# once is not what we look for. Both runs are printed. Several run at once, so each target remembers its own failures.
define tests
@$(1) -o cache_dir=build/cache-$@ || { echo "== once more: what failed"; \
	$(1) -o cache_dir=build/cache-$@ --last-failed --last-failed-no-failures=none; }
endef

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build:
	@mkdir -p build

.PHONY: packages test-packages
packages: | build
	$(call apt_install,packages.txt)
test-packages: | build
	$(call apt_install,$(TEST_PACKAGES))

# Debian's own python3: python3-bpfcc comes from Debian and is seen through --system-site-packages.
# --no-deps: the lock names every package. pip 23 else takes `coverage[toml]`, which pytest-cov wants, for a package of its
# own, picks the newest one, and finds no hash for it.
$(VENV)/.done: requirements.lock pyproject.toml | packages
	@echo "making the virtual environment $(VENV)"
	@/usr/bin/python3 -m venv --system-site-packages $(VENV)
	@$(PYTHON) -m pip install --quiet --require-hashes --no-deps --requirement requirements.lock
	@$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: venv bpf mounts setup protos lock
venv: $(VENV)/.done
bpf: | packages ## compile the BPF objects
	@$(MAKE) -s -C bpf
mounts:
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
	@mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
setup: packages venv bpf mounts ## install and build what `probefleet run` needs on this machine

protos: venv ## generate the wire's code from protos/
	PATH=$(abspath $(VENV))/bin:$$PATH $(PYTHON) -m grpc_tools.protoc --proto_path=protos --python_out=protos \
		--mypy_out=quiet:protos --grpc_python_out=protos protos/probefleet_wire/*/*.proto
	rm -f protos/probefleet_wire/v1/plan_pb2_grpc.py
lock: ## lock the versions of all Python packages (needs uv)
	uv pip compile --universal --python-version 3.11 --all-extras --group dev --generate-hashes -q pyproject.toml \
		-o requirements.lock

.PHONY: plugin
plugin: setup ## a wheel of `kubectl probefleet` for other machines, in build/plugin
	@rm -rf build/plugin
	@$(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/plugin .
	@ls build/plugin/*.whl

.PHONY: demo
demo: setup ## measure this machine: a histogram, an inline BCC program, and events
	@examples/demo

.PHONY: check lint types unit
check: lint types unit ## lint, types and unit tests (under 60 s)
lint: venv
	@$(VENV)/bin/ruff check -q . && $(VENV)/bin/ruff format -q --check .
	@PATH=$(abspath $(VENV))/bin:$$PATH lint-imports --no-cache | tail -12
types: venv
	@MYPY_CACHE_DIR=$(CACHE)/mypy $(VENV)/bin/mypy --no-error-summary
# The tests of pure modules under coverage, the others without: what these do in passing would count as covered as well,
# and while it is watched Python takes half as long again.
unit: venv bpf mounts
	@$(PYTEST) -n $(WORKERS) $(PURE_TESTS) $(addprefix --cov=,$(PURE)) --cov-branch --cov-report=term:skip-covered \
		--cov-report=json:build/coverage.json
	@$(PYTHON) -m tests.coverage_of_each build/coverage.json 95
	$(if $(BUSY),$(call tests,$(OTHER_TESTS)),@$(OTHER_TESTS))

.PHONY: test test-kernel test-vm test-e2e test-e2e-beside test-e2e-last record scale
test: test-packages mounts bpf ## everything: lint, types, unit, this kernel, a VM's kernel, a real cluster
	@$(CLUSTER) build
	@$(MAKE) -s -C tests/workloads
	@# Images and the virtual environment wait for the disk, and the last tests of end to end for pods and nodes: the unit
	@# tests and this kernel's run meanwhile. A kernel in a VM takes a CPU from the first to the last.
	@$(MAKE) cluster-images >build/cluster-images.log 2>&1 & images=$$!; vm= here=; \
	trap 'kill $$vm $$here 2>/dev/null || true; wait $$images || true' EXIT; failed=0; \
	$(MAKE) setup; \
	$(MAKE) --keep-going test-foreign-tenth test-vm ROWS=--third >build/test-vm.log 2>&1 & vm=$$!; \
	$(MAKE) lint types; \
	wait $$images || { cat build/cluster-images.log; exit 1; }; \
	$(MAKE) test-e2e-beside || failed=1; \
	nice -n 5 $(MAKE) --keep-going unit test-kernel BUSY=yes >build/test-here.log 2>&1 & here=$$!; \
	$(MAKE) test-e2e-last || failed=1; \
	wait $$here || failed=1; echo "== unit, test-kernel"; cat build/test-here.log; \
	wait $$vm || failed=1; echo "== test-vm"; cat build/test-vm.log; \
	exit $$failed
test-kernel: setup test-packages ## real BPF programs in this machine's kernel
	$(call tests,$(PYTEST) -n 2 --dist loadfile tests/kernel --ignore=tests/kernel/vm_only)
test-vm: setup test-packages ## what docs/kernels.md says of one kernel; VM_SUITE=sid takes another (`test`: a third of it)
	@$(MAKE) -s -C tests/workloads
	@suite=$(or $(VM_SUITE),$$($(PYTHON) -m tests.kernel.matrix turn)); \
	$(PYTHON) -m tests.kernel.matrix run $$suite $(ROWS) \
		|| { echo "== once more: what failed"; $(PYTHON) -m tests.kernel.matrix run $$suite $(ROWS) --rest; }
	$(call tests,$(PYTEST) -m vm tests/e2e)
scale: setup ## one operator under 5,000 simulated agents, about three minutes
	@ulimit -n $$(ulimit -Hn); $(PYTHON) -m tests.scale.run
record: setup test-packages ## take the recorded frames of tests/recordings anew, on this machine's kernel
	@$(CLUSTER) build
	@$(PYTHON) -m tests.recordings.record
test-e2e: test-e2e-beside test-e2e-last ## end to end, on a real three-node Kubernetes
test-e2e-beside: setup test-packages cluster-images
	$(call tests,$(CLUSTER) run $(abspath $(PYTHON)) -m pytest -q -n 4 --dist loadfile -m "not (quiet or alone or vm)" tests/e2e)
test-e2e-last: setup test-packages cluster-images
	$(call tests,$(CLUSTER) run $(abspath $(PYTHON)) -m pytest -q -n 2 --dist loadfile -m quiet tests/e2e)
	$(call tests,$(CLUSTER) run $(abspath $(PYTHON)) -m pytest -q -m alone tests/e2e)

.PHONY: test-kernels record-kernels test-all
test-kernels: setup test-packages ## the same of all: Linux 5.10, 6.1, 6.12 and the newest, and this machine's
	@$(MAKE) -s -C tests/workloads
	@$(PYTHON) -m tests.kernel.matrix run here $(KERNELS)
record-kernels: venv ## what test-kernels saw last becomes the table of docs/kernels.md
	@$(PYTHON) -m tests.kernel.matrix record
test-all: check test-kernel test-kernels test-e2e test-foreign ## everything there is, on every kernel; hours

.PHONY: test-foreign test-foreign-tenth
# Programs that nobody here wrote, unchanged: Debian's bpfcc-tools and bpftrace, as policies on Linux 6.12.
test-foreign: setup test-packages ## every program of bpfcc-tools and bpftrace, as a policy on another kernel
	@tests/kernel/vm fetch bookworm-backports
	@$(PYTHON) -m tests.foreign.run --write
test-foreign-tenth: setup test-packages ## a tenth of them, another one for every commit, in one boot
	@tests/kernel/vm fetch bookworm-backports
	@$(PYTHON) -m tests.foreign.run --tenth

.PHONY: cluster-images cluster-demo cluster-down
cluster-images: test-packages mounts bpf
	@$(CLUSTER) build
	@images/build
	@$(CLUSTER) up 3 --images build/images/operator.tar build/images/agent.tar build/images/test.tar
cluster-demo: setup cluster-images ## a real cluster on this machine, with Probefleet installed and examples applied
	@examples/cluster-demo
cluster-down: ## stop the cluster of cluster-demo; nothing of it is left
	@$(CLUSTER) down
