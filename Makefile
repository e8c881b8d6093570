# `make help` lists what there is. Every recipe works on a fresh Debian 12 machine as root.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PYTHON := $(VENV)/bin/python
BUILD := build

# Debian's own python3: python3-bpfcc comes from Debian and is seen through --system-site-packages.
$(VENV)/.done: requirements.lock pyproject.toml
	/usr/bin/python3 -m venv --system-site-packages $(VENV)
	$(PYTHON) -m pip install --quiet --require-hashes --requirement requirements.lock
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.PHONY: protos
protos: $(VENV)/.done ## generate the wire's code from protos/
	$(PYTHON) -m grpc_tools.protoc --proto_path=protos --python_out=protos --mypy_out=protos --grpc_python_out=protos \
		protos/probefleet_wire/v1/*.proto
