# `make run` and `make test` are all that a newcomer needs; both install what is missing (`make deps`).
MUSL := x86_64-unknown-linux-musl
BARE := x86_64-unknown-none

.PHONY: all deps build payloads run test test-all lint unit payload domain bench fuzz clean

all: build

deps: ## Install the Debian packages, Rust targets and tools that are missing
	@tests/deps.sh

build: deps ## The shipped binaries, static, in target/x86_64-unknown-linux-musl/release
	cargo build --release --target $(MUSL) -p cofferdam-vmm -p cofferdam-cli -p cofferdam-jailer -p cofferdam-test-guest
	@cat "$$(ls -t target/$(MUSL)/release/build/cofferdam-confidential-*/out/stage-pages | head -n 1)"

payloads: deps ## The tiny guests of the payload tier
	cargo build --release --target $(BARE) -p cofferdam-payloads

run: build ## Boot a Debian guest that prints its kernel version and a file from its disk
	@cargo xtask demo && echo "make run: a Debian guest ran in a domain of its own and powered off"

test: lint unit payload domain ## Every tier
	@echo "make test: lint, unit, payload and domain tiers passed"

test-all: lint unit build payloads ## Every tier, the long tests and those that need root included
	cargo test -p cofferdam-tests --features payload --tests -- --include-ignored
	cargo test -p cofferdam-confidential --test digests -- --ignored
	cargo test -p xtask --test rig -- --ignored --test-threads=1
	@cargo xtask domain-tests --long
	@echo "make test-all: lint, unit, payload and domain tiers passed, long tests included"

lint: deps
	cargo fmt --all --check
	cargo clippy --workspace --exclude cofferdam-payloads --exclude cofferdam-stage --all-targets --all-features -- -D warnings
	cargo clippy -p cofferdam-payloads -p cofferdam-stage --target $(BARE) -- -D warnings
	cargo deny --log-level error check licenses bans sources

unit: deps ## Pure logic, anywhere
	cargo test --workspace --exclude cofferdam-payloads --exclude cofferdam-stage
	cargo test -p cofferdam-firmware --lib -- --ignored iasl

payload: build payloads ## The monitor and tiny guests, on any /dev/kvm
	cargo test -p cofferdam-tests --features payload --tests

domain: build ## Linux guests, on hardware KVM or in the rig
	cargo test -p xtask --test rig -- --ignored --test-threads=1
	@cargo xtask domain-tests

bench: build payloads ## Side by side with the floor and with QEMU's microvm: a table, and target/bench.json
	cargo build --release --target $(MUSL) -p cofferdam-benches
	@target/$(MUSL)/release/bench

fuzz: ## Each fuzz target for FUZZ_SECONDS (60); needs the nightly toolchain and cargo-fuzz
	@tests/fuzz/run.sh

clean:
	cargo clean
