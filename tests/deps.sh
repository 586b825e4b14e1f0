#!/bin/sh
# Installs what building and testing Cofferdam needs on Debian 12 (bookworm),
# as far as it is missing, and says what it does. Kernels, busybox and firmware
# for the tests are not installed: `cargo xtask assets` fetches them into a cache.
set -eu
cd "$(dirname "$0")/.."

# A C toolchain to link with; tools of the tests; what other people's launch digests, which tests
# compare ours with, are computed with; what makes the emulated secure processor's certificates, and
# libraries of the emulator.
packages="gcc libc6-dev make git ca-certificates debian-archive-keyring
    xz-utils zstd e2fsprogs util-linux acpica-tools curl cryptsetup-bin erofs-utils strace tmux
    libssl-dev pkg-config python3-venv
    openssl libglib2.0-0 libpixman-1-0 libnettle8 libhogweed6 libgmp10 libssl3 zlib1g"
# The toolchain, with its targets, is that of rust-toolchain.toml.
field() { sed -n "s/^$1 = //p" rust-toolchain.toml | tr -d '[]",'; }
toolchain=$(field channel)
targets=$(field targets)

missing=
for package in $packages; do
    case $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) in
    installed) ;;
    *) missing="$missing $package" ;;
    esac
done
if [ -n "$missing" ]; then
    install="apt-get install -y --no-install-recommends$missing"
    if [ "$(id -u)" = 0 ]; then
        as_root=env
    elif command -v sudo >/dev/null; then
        as_root="sudo env"
    else
        echo "deps: as root, run: $install" >&2
        exit 1
    fi
    echo "deps: $install"
    $as_root apt-get -qq update
    $as_root DEBIAN_FRONTEND=noninteractive $install
fi

if command -v rustup >/dev/null; then
    if ! rustup run "$toolchain" rustc --version >/dev/null 2>&1; then
        echo "deps: rustup toolchain install $toolchain"
        rustup toolchain install
    fi
    installed=$(rustup target list --installed)
    for target in $targets; do
        if ! echo "$installed" | grep -qx "$target"; then
            echo "deps: rustup target add $target"
            rustup target add "$target"
        fi
    done
elif ! command -v cargo >/dev/null; then
    echo "deps: no Rust toolchain; install rustup, or Rust $toolchain with the targets $targets" >&2
    exit 1
fi
if ! command -v cargo-deny >/dev/null; then
    echo "deps: cargo install cargo-deny (checks licences; about two minutes)"
    # Quick to build rather than quick to run.
    cargo install --quiet --locked --config profile.release.opt-level=0 cargo-deny
fi
echo "deps: complete"
