#!/bin/sh
# Runs a container in a domain of its own with nothing but curl: one request, one domain, one container. It is a test, and
# an example for whoever writes a client (docs/api.md explains the requests).
#
#   tests/curl/container.sh plain|jailed BIN IMAGE MANIFEST LAYER...
#
# plain:    cofferdam-vmm runs as the caller. jailed: cofferdam-jailer, started by root, runs it as another user.
# BIN:      the folder of both, such as target/x86_64-unknown-linux-musl/release
# IMAGE:    what `cofferdam image build --init` makes
# MANIFEST: it has to allow the command of `ready` below, the signal USR1, and a stop. The container has to make the file
#           /ready and to run until it is sent USR1, which it ends of with 7, or stopped, with 8; it needs a scratch device
#           of 16 MiB.
set -eu

usage="usage: container.sh plain|jailed BIN IMAGE MANIFEST LAYER..."
mode=${1:?$usage} bin=${2:?$usage} image=${3:?$usage} manifest=${4:?$usage} layer=${5:?$usage}
shift 4
. "$(dirname "$0")/common.sh"

# Waits, by a command in the container, until that minds signals.
ready() {
    api 200 POST /container/exec '{"args": ["/bin/sh", "-c", "until [ -e /ready ]; do sleep 0.1; done; exit 3"]}'
    says '"exit_code":3'
}

# start LAYER...: starts a monitor, and a domain with the container.
start() {
    if [ "$mode" = plain ]; then
        inside=$work outside=$work image_path=$image manifest_path=$manifest
        layers=$(printf ', "%s"' "$@")
        "$bin/cofferdam-vmm" --id curl --api-sock "$work/api.sock" &
    else
        inside='' outside=$work/jails/cofferdam-vmm/curl/root image_path=/image manifest_path=/manifest.json
        binds="--bind $image:/image --bind $manifest:/manifest.json" layers=
        for layer; do
            binds="$binds --bind $layer:/layer$#"
            layers="$layers, \"/layer$#\""
            shift
        done
        # shellcheck disable=SC2086 # several words
        "$bin/cofferdam-jailer" --id curl --exec-file "$bin/cofferdam-vmm" --uid "$user" --gid "$user" \
            --chroot-base-dir "$work/jails" $binds -- --api-sock /api.sock &
    fi
    monitor=$!
    socket=$outside/api.sock console=$outside/console
    wait_for_api
    api 400 GET /container/stats
    begin_waiting
    api 204 PUT '/vm?start=true' "{
        \"boot-source\": {\"image_path\": \"$image_path\"},
        \"machine-config\": {\"vcpu_count\": 1, \"mem_size_mib\": 256},
        \"container\": {\"manifest\": \"$manifest_path\", \"layers\": [${layers#, }], \"scratch\": {\"size\": 16777216}},
        \"serial\": {\"serial_out_path\": \"$inside/console\"},
        \"stop_timeout_ms\": 120000}"
    # It is refused until the container runs.
    until curl --silent --fail --unix-socket "$socket" http://localhost/container/stats > /dev/null; do
        kill -0 "$monitor" || fail "the monitor has ended"
        sleep 0.2
    done
}

echo "== asked, and ended by a signal"
start "$@"
api 200 GET /vm
says "\"manifest_digest\":\"$(sha256sum "$manifest" | cut -d ' ' -f 1)\""
says '"asserted_by_host":true,"step":"running","failure":null'
ready
# What the manifest does not grant is refused, and counted.
api 400 POST /container/exec '{"args": ["/bin/sh", "-c", "exit 4"]}'
says 'host.exec'
api 400 POST /container/kill '{"signal": "KILL"}'
says 'host.signals'
api 400 POST /container/resize '{"columns": 80, "rows": 24}'
api 200 GET /container/stats
says '"refused":{"Exec":1'
api 204 POST /container/kill '{"signal": "USR1"}'
finish 7 power_off
says '"exit_code":7'
says '"step":"stopping"'

echo "== stopped"
start "$@"
ready
api 204 DELETE /vm
finish 143 stopped
says '"exit_code":8'
says '"message":"stopped on request: the guest powered off"'

echo "container.sh: two containers ($mode) were run to their ends"
