# Each target has a sentence after ##; `make` prints them.
.DEFAULT_GOAL := help
.PHONY: help demo test clients lint bench simulate soak fuzz e2e e2e-first-act e2e-shapes image release reproducible setup fmt

# The lab passes the agent's binary to its child processes in this variable.
CARGO ?= cargo
TOOLS := target/tools/bin
DENY_VERSION := 0.20.2
FUZZ_VERSION := 0.13.2
SECONDS ?= 60
# `address` needs RUSTC_BOOTSTRAP=1 on a stable compiler, and finds little where unsafe code is forbidden.
SANITIZER ?= none

help: ## Print these sentences.
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## Demonstrate the agent on this machine: three pods, a redirect, an STS; no cluster, no AWS. KEEP=1 leaves it running.
	@tests/setup.sh packages
	@echo "building; some minutes the first time"
	@$(CARGO) build --quiet --package kirsa --package lab --bins
	@target/debug/demo $(if $(KEEP),--keep)

test: setup ## Install what the tests need, then run all tests, on real parts.
	$(CARGO) test --workspace --no-fail-fast --lib --bins --tests

clients: ## Run real AWS clients, old and new, in every condition; writes the matrix to docs/clients.md. ONLY=name selects.
	@tests/setup.sh clients
	@$(CARGO) build --quiet --package kirsa --package lab --bins
	@target/debug/clients $(if $(ONLY),--only $(ONLY),--page docs/clients.md)

lint: $(TOOLS)/cargo-deny ## Check formatting, clippy, and the dependencies against deny.toml.
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(TOOLS)/cargo-deny --log-level error check bans licenses sources

bench: ## Measure against a bare hyper server in the same run; writes ratios to target/bench/summary.json.
	@tests/setup.sh
	$(CARGO) bench --bench ratios

fuzz: $(TOOLS)/cargo-fuzz ## Fuzz one kind of input with libFuzzer (needs g++): make fuzz TARGET=request SECONDS=60; src/fuzz.rs lists them.
	@cp Cargo.lock fuzz/Cargo.lock
	@mkdir -p target/fuzz/corpus/$(TARGET)
	PATH="$(CURDIR)/$(TOOLS):$$PATH" CARGO_TARGET_DIR=target/fuzz $(CARGO) fuzz run --sanitizer $(SANITIZER) $(TARGET) \
		target/fuzz/corpus/$(TARGET) fuzz/corpus/$(TARGET) -- -max_total_time=$(SECONDS)

soak: ## Run a busy node: 250 pods come, go and send requests like SDKs; verify which pod got which credentials. MINUTES=5
	@tests/setup.sh
	@$(CARGO) build --quiet --package kirsa --package lab --bins
	@target/debug/soak --minutes $(or $(MINUTES),5)

simulate: ## Simulate the load of 5,000 nodes on STS and the API server. NODES=, RUNS=, PODS=, ACCOUNTS=, STS_MILLIS=, SESSION=, WINDOW=
	NODES=$(NODES) RUNS=$(RUNS) PODS=$(PODS) ACCOUNTS=$(ACCOUNTS) STS_MILLIS=$(STS_MILLIS) SESSION=$(SESSION) WINDOW=$(WINDOW) \
		$(CARGO) test --lib -- --ignored --exact --nocapture agent::simulation::report::print_table

e2e: ## Deploy the image on a one-node cluster of real parts and run the scenarios (needs root). KEEP=1 leaves it running.
	@tests/setup.sh e2e
	KEEP=$(KEEP) tests/e2e.sh $(SCENARIOS)

e2e-first-act: ## Run 1,000 pods that request credentials in their first instruction, on that cluster (needs root).
	@tests/setup.sh e2e
	FIRST_ACT=$(or $(FIRST_ACT),1000) tests/e2e.sh first-act

e2e-shapes: ## Run each type of pod network with each mode of kube-proxy, each on its own cluster (needs root).
	@tests/setup.sh e2e
	tests/e2e-shapes.sh

image: ## Build the container image with buildah or docker, and print its size.
	daemonset/image.sh

release: ## Build the committed version and push image and chart: make release REGISTRY=registry.example.com/path ARCHS="amd64 arm64"
	@REGISTRY='$(REGISTRY)' ARCHS='$(ARCHS)' release/release.sh

reproducible: ## Build the committed image twice, in different directories, and compare (two release builds).
	@tests/setup.sh release
	@release/reproducible.sh

setup: ## Install what the tests need: Debian packages, and kube-apiserver, etcd, helm, ... built with Go.
	tests/setup.sh

fmt: ## Format the code.
	$(CARGO) fmt --all

$(TOOLS)/cargo-deny:
	$(CARGO) install cargo-deny --quiet --locked --version $(DENY_VERSION) --root target/tools

$(TOOLS)/cargo-fuzz:
	$(CARGO) install cargo-fuzz --quiet --locked --version $(FUZZ_VERSION) --root target/tools
