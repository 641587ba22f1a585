# SPDX-License-Identifier: GPL-3.0-or-later
# Everything that is done with this repository is a target here; `make` lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/isthmus
# Never in the clone: exact requirements make the name, so clones share it and a change makes a new one.
VENV := $(CACHE)/venv-$(shell cat requirements/controller.txt requirements/agent.txt | sha256sum | cut -c1-12)
BIN := $(VENV)/bin
PYTHON ?= 3.11
ARCH ?= $(shell uname -m)
INVENTORY ?= inventories/lab
ARGS ?=
SCENARIO ?=
ONLY ?=
LAB_TOOL := tests/lab/lab

export ANSIBLE_CONFIG := $(CURDIR)/tests/lab/ansible.cfg
export ANSIBLE_COLLECTIONS_PATH := $(CURDIR)/build/collections
export ANSIBLE_HOME := $(CURDIR)/build/ansible
export PYTHONDONTWRITEBYTECODE := 1
# Tools of the gates start each other by name (ansible-lint, molecule).
export PATH := $(BIN):$(PATH)

.PHONY: help setup env lock bpf bundle wheelhouse image collection kubernetes rootfs lab-up lab-down lab-exec lab-map site plan verify molecule demo \
	check lint gates parts pytest test test-full bench bench-kubernetes bench-paths clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' Makefile

setup: ## install what is missing: Debian packages, the Python environment (in the user's cache)
	@sh scripts/setup.sh $(VENV)

lock: setup ## resolve requirements/controller.in into exact versions
	@sh scripts/lock.sh

bpf: setup ## compile the datapath
	@$(MAKE) --no-print-directory -C bpf

bundle: setup ## make the agent bundle for hosts (PYTHON=3.11 ARCH=x86_64, also 3.10 to 3.13 and aarch64)
	@$(BIN)/python scripts/bundle.py bundle --python $(PYTHON) --arch $(ARCH)

wheelhouse: setup ## fetch the agent's third-party wheels into the cache (PYTHON=, ARCH=)
	@$(BIN)/python scripts/bundle.py wheelhouse --python $(PYTHON) --arch $(ARCH)

image: bundle ## make the container image for Kubernetes clusters, build/isthmus-<version>.oci.tar (as root)
	@$(BIN)/python scripts/image.py

collection: bundle ## build the collection's artifact and install it in build/collections
	@$(BIN)/python scripts/bundle.py collection

kubernetes: setup ## build the programs of the lab's Kubernetes clusters (minutes, once; in the user's cache)
	@$(BIN)/python tests/lab/kubernetes_parts.py

rootfs: setup ## make the root file system of the lab's machines (minutes, once; in the user's cache)
	@$(BIN)/python tests/lab/rootfs.py

lab-up: setup ## boot the lab: six systemd machines in three sites
	@$(LAB_TOOL) up

lab-down: ## end the lab and remove every trace of it
	@$(LAB_TOOL) down

lab-exec: ## run a command as root on a lab machine, in its own cgroup (HOST=edge-1 CMD='isthmus status')
	@test -n '$(HOST)' || { echo "lab-exec: say which machine: make lab-exec HOST=edge-1 CMD='uptime'" >&2; exit 2; }
	@$(LAB_TOOL) exec '$(HOST)' -- sh -c "$$CMD"
lab-exec: export CMD := $(CMD)

lab-map: ## show a BPF map of a lab machine (HOST=edge-1 MAP=svc); without MAP, the names of all
	@pid=$$($(LAB_TOOL) status | awk '$$1 == "$(HOST)" { print $$5 }') && test -n "$$pid" || \
		{ echo "lab-map: no such machine: '$(HOST)'; say make lab-map HOST=edge-1 MAP=svc" >&2; exit 2; }; \
	pins=/proc/$$pid/root/sys/fs/bpf/isthmus/v1; \
	if [ -n "$(MAP)" ]; then bpftool map dump pinned "$$pins/$(MAP)"; else ls "$$pins"; fi

env: setup ## print shell commands that put the environment's tools and the built collection to use (README.md)
	@echo 'export PATH=$(BIN):$$PATH ANSIBLE_COLLECTIONS_PATH=$(ANSIBLE_COLLECTIONS_PATH)'

molecule: collection lab-up ## the scenarios: converge, idempotence, verify, teardown on the lab (SCENARIO=bgp for one)
	@NO_COLOR=1 $(BIN)/molecule test $(if $(SCENARIO),--scenario-name $(SCENARIO),--all)

site plan verify: collection ## run the playbook isthmus.mesh.<target> on the lab (INVENTORY=, ARGS=)
	@$(BIN)/ansible-playbook -i $(INVENTORY) isthmus.mesh.$@ $(ARGS)

demo: ## set everything up, boot the lab, show the product with real requests, then with Kubernetes (LAB=machines: without)
	@sh scripts/demo.sh '$(VENV)'

check: bpf gates ## the quick loop: gates and unit tests, under a minute when warm
	@$(BIN)/python -m pytest -q tests/unit --hypothesis-profile=quick $(ARGS)

lint: bundle ## every gate
	@sh scripts/lint.sh all

gates: setup
	@sh scripts/lint.sh quick

# What is made once and kept in the user's cache, and the image: one waits for the network while another compiles.
parts: setup
	@$(MAKE) --no-print-directory --jobs 2 kubernetes image rootfs

pytest: bpf ## run tests (ARGS='tests/unit -k name')
	@$(BIN)/python -m pytest $(ARGS)

test: gates collection parts ## every gate and every test that fits into every run (CI runs this)
	@sh scripts/test.sh

test-full: export ISTHMUS_FULL := 1
test-full: gates collection parts ## what is too long for every run as well, or parts (ONLY='tests/kernel molecule/bgp'); writes docs/test-full.md
	@sh scripts/test.sh full $(ONLY)

bench: collection lab-up ## measure the estate and all paths on the lab, each figure beside a baseline; gates nothing
	@$(BIN)/ansible-playbook -i $(INVENTORY) isthmus.mesh.site > build/bench-site.log || { cat build/bench-site.log; exit 1; }
	@$(BIN)/python tests/bench/bench.py
	@$(BIN)/python tests/bench/paths.py

bench-paths: collection lab-up ## measure the paths only: tunnel, native, WireGuard, gateways, beside the bare network and the same by hand
	@$(BIN)/ansible-playbook -i $(INVENTORY) isthmus.mesh.site > build/bench-site.log || { cat build/bench-site.log; exit 1; }
	@$(BIN)/python tests/bench/paths.py $(STEPS)

bench-kubernetes: bpf ## measure a registrar with 10,000 pods in a real API server (PODS=1000 for fewer); gates nothing
	@$(BIN)/python tests/bench/kubernetes_scale.py

clean: ## remove what was built in the clone (the cache and the lab stay)
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis agent/isthmus_agent/bpf/objects/*.bpf.o
