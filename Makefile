# `make run` and `make test` are all that a newcomer needs; both install what is missing (`make deps`).
MUSL := x86_64-unknown-linux-musl
BARE := x86_64-unknown-none

# Where `make install` puts what, below DESTDIR.
PREFIX ?= /usr/local
DESTDIR ?=
BINARIES := cofferdam cofferdam-vmm cofferdam-jailer
UNITS := cofferdam-vmm@.socket cofferdam-vmm@.service
# What is installed, as `make build manuals` leaves it.
BIN_DIR ?= target/$(MUSL)/release
MANUALS ?= target/manuals
# The image in whose domains containers run, as `make domain-image` leaves it.
DOMAIN_IMAGE ?= target/domain.igvm
AT = $(DESTDIR)$(PREFIX)
MAN_DIR = $(AT)/share/man/man1
BASH_DIR = $(AT)/share/bash-completion/completions
ZSH_DIR = $(AT)/share/zsh/site-functions
FISH_DIR = $(AT)/share/fish/vendor_completions.d
UNIT_DIR = $(AT)/lib/systemd/system
INIT_DIR = $(AT)/lib/cofferdam
IMAGE_DIR = $(AT)/share/cofferdam

.PHONY: all deps build payloads run test test-all lint unit payload domain snp bench fuzz seccomp-unused manuals domain-image install install-built uninstall clean

all: build

deps: ## Install the Debian packages, Rust targets and tools that are missing
	@tests/deps.sh

build: deps ## The shipped binaries, static, in target/x86_64-unknown-linux-musl/release
	cargo build --release --target $(MUSL) -p cofferdam-vmm -p cofferdam-cli -p cofferdam-jailer -p cofferdam-guest -p cofferdam-test-guest
	@cat "$$(ls -t target/$(MUSL)/release/build/cofferdam-confidential-*/out/stage-pages | head -n 1)"

payloads: deps ## The tiny guests of the payload tier
	cargo build --release --target $(BARE) -p cofferdam-payloads

run: build ## Build a container image of Debian packages and run it in a domain
	@cargo xtask demo && echo "make run: a container ran in a domain of its own"

test: lint unit payload domain snp ## Every tier
	@echo "make test: lint, unit, payload, domain and SNP tiers passed"

test-all: lint unit build payloads seccomp-unused ## Every tier, the long tests and those that need root included
	cargo test -p cofferdam-tests --features payload --tests -- --include-ignored
	cargo test -p cofferdam-confidential --test digests -- --ignored
	cargo test -p cofferdam-container --test images --test limits -- --ignored
	cargo test -p xtask --test rig -- --ignored --test-threads=1
	@cargo xtask domain-tests --long
	@cargo xtask domain-tests --long --small-kernel container
	@cargo xtask snp-tests --long
	@echo "make test-all: lint, unit, payload, domain and SNP tiers passed, long tests included"

lint: deps
	cargo fmt --all --check
	cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	# What libFuzzer itself is built with need not be there to check what uses it.
	CUSTOM_LIBFUZZER_PATH=/none/libfuzzer.a cargo check --quiet --manifest-path tests/fuzz/Cargo.toml --bins
	cargo clippy --workspace --exclude cofferdam-payloads --exclude cofferdam-stage --all-targets --all-features -- -D warnings
	cargo clippy -p cofferdam-payloads -p cofferdam-stage --target $(BARE) -- -D warnings
	cargo deny --log-level error check licenses bans sources

unit: deps ## Pure logic, anywhere
	cargo test --workspace --exclude cofferdam-payloads --exclude cofferdam-stage
	cargo test -p cofferdam-firmware --lib -- --ignored iasl

payload: build payloads ## The monitor and tiny guests, on any /dev/kvm
	cargo test -p cofferdam-tests --features payload --tests

seccomp-unused: build payloads ## System calls that the seccomp policies allow and no test needs: none
	@cargo xtask seccomp-unused

domain: build ## Linux guests, on hardware KVM or in the rig
	cargo test -p xtask --test rig -- --ignored --test-threads=1
	@cargo xtask domain-tests

snp: build payloads ## Protected guests, on SEV-SNP hardware or in the rig with an emulated secure processor
	@cargo xtask snp-tests

bench: build payloads ## Side by side with the floor and with QEMU's microvm: a table, and target/bench.json
	cargo build --release --target $(MUSL) -p cofferdam-benches
	@target/$(MUSL)/release/bench

fuzz: ## Each fuzz target for FUZZ_SECONDS (60); needs the nightly toolchain and cargo-fuzz
	@tests/fuzz/run.sh

manuals: deps ## Man pages and shell completions, in target/manuals
	cargo run --quiet -p cofferdam-manuals -- "$(MANUALS)"

domain-image: build ## The image of containers' domains, with Debian's cloud kernel
	@cargo xtask domain-image "$(DOMAIN_IMAGE)"

install: build manuals domain-image ## The programs, man pages, completions, units and domain image, below PREFIX (/usr/local) and DESTDIR
	@$(MAKE) --no-print-directory install-built

install-built: ## The same of what is built already: `make build manuals domain-image && sudo make install-built`
	install -d "$(AT)/bin" "$(MAN_DIR)" "$(BASH_DIR)" "$(ZSH_DIR)" "$(FISH_DIR)" "$(UNIT_DIR)" "$(INIT_DIR)" "$(IMAGE_DIR)"
	for name in $(BINARIES); do install -m 755 "$(BIN_DIR)/$$name" "$(AT)/bin/" || exit 1; done
	install -m 755 "$(BIN_DIR)/cofferdam-init" "$(INIT_DIR)/"
	install -m 644 "$(DOMAIN_IMAGE)" "$(IMAGE_DIR)/domain.igvm"
	install -m 644 "$(MANUALS)"/man/*.1 "$(MAN_DIR)/"
	install -m 644 "$(MANUALS)"/bash/* "$(BASH_DIR)/"
	install -m 644 "$(MANUALS)"/zsh/* "$(ZSH_DIR)/"
	install -m 644 "$(MANUALS)"/fish/* "$(FISH_DIR)/"
	for unit in $(UNITS); do \
		sed 's|@PREFIX@|$(PREFIX)|' "resources/systemd/$$unit" > "$(UNIT_DIR)/$$unit" && \
		chmod 644 "$(UNIT_DIR)/$$unit" || exit 1; \
	done

uninstall: ## Removes what `make install` with the same PREFIX and DESTDIR has put in place
	for name in $(BINARIES); do \
		rm -f "$(AT)/bin/$$name" "$(BASH_DIR)/$$name" "$(ZSH_DIR)/_$$name" "$(FISH_DIR)/$$name.fish"; \
	done
	rm -f "$(MAN_DIR)"/cofferdam.1 "$(MAN_DIR)"/cofferdam-*.1
	for unit in $(UNITS); do rm -f "$(UNIT_DIR)/$$unit"; done
	rm -f "$(INIT_DIR)/cofferdam-init" "$(IMAGE_DIR)/domain.igvm"
	@rmdir "$(INIT_DIR)" "$(IMAGE_DIR)" 2>/dev/null || true

clean:
	cargo clean
