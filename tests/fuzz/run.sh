#!/bin/sh
# Runs every fuzz target for FUZZ_SECONDS (60), one after another, or those that are named. What was found to be of
# interest stays in corpus/ and is where the next run begins; inputs that break a target are in artifacts/.
set -eu
cd "$(dirname "$0")"
seconds=${FUZZ_SECONDS:-60}

missing=
cargo +nightly --version >/dev/null 2>&1 || missing="$missing
fuzz: no nightly toolchain: rustup toolchain install nightly --profile minimal"
[ -d "$(rustc +nightly --print target-libdir --target x86_64-unknown-none 2>/dev/null)" ] || missing="$missing
fuzz: nightly cannot build the first stage: rustup target add --toolchain nightly x86_64-unknown-none"
cargo fuzz --version >/dev/null 2>&1 || missing="$missing
fuzz: no cargo-fuzz: cargo install --locked cargo-fuzz"
command -v c++ >/dev/null || missing="$missing
fuzz: no C++ compiler, which libFuzzer needs: apt-get install g++"
if [ -n "$missing" ]; then
    echo "fuzz: cannot run:$missing" >&2
    exit 1
fi

targets=${*:-$(cargo +nightly fuzz list --fuzz-dir .)}
for target in $targets; do
    cargo +nightly fuzz build --fuzz-dir . "$target"
done
mkdir -p target
for target in $targets; do
    log=target/$target.log
    if ! cargo +nightly fuzz run --fuzz-dir . "$target" -- -max_total_time="$seconds" -rss_limit_mb=2048 \
        -timeout=20 -print_final_stats=1 >"$log" 2>&1; then
        tail -n 60 "$log" >&2
        echo "fuzz: $target failed; its whole output is in tests/fuzz/$log" >&2
        exit 1
    fi
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    echo "fuzz: $target: $seconds s, $runs runs, $edges edges covered"
done
echo "fuzz: every target held for $seconds s"
