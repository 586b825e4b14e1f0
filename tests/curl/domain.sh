#!/bin/sh
# Drives Linux domains with nothing but curl: one that is configured call by call, and one that is configured and
# started in one body. It is a test, and an example for whoever writes a client (docs/api.md explains the requests).
#
#   tests/curl/domain.sh plain|jailed BIN KERNEL INITRD CMDLINE
#
# plain:  cofferdam-vmm runs as the caller. jailed: cofferdam-jailer, started by root, runs it as another user.
# BIN:    the folder of both, such as target/x86_64-unknown-linux-musl/release
# The guest has to print "waiting for the power button" on its console, and to power off when that is pressed.
set -eu

usage="usage: domain.sh plain|jailed BIN KERNEL INITRD CMDLINE"
mode=${1:?$usage} bin=${2:?$usage} kernel=${3:?$usage} initrd=${4:?$usage} cmdline=${5:?$usage}
. "$(dirname "$0")/common.sh"

# Starts a monitor that waits for its domain. Afterwards `socket` is its API, and paths in bodies begin with `inside`:
# a jailed monitor has a root directory of its own, which lies in `outside`.
start_monitor() {
    truncate -s 1M "$work/disk.img"
    if [ "$mode" = plain ]; then
        inside=$work outside=$work
        cp "$kernel" "$work/kernel"
        cp "$initrd" "$work/initrd"
        "$bin/cofferdam-vmm" --id curl --api-sock "$work/api.sock" &
    else
        inside='' outside=$work/jails/cofferdam-vmm/curl/root
        chown "$user:$user" "$work/disk.img"
        "$bin/cofferdam-jailer" --id curl --exec-file "$bin/cofferdam-vmm" --uid "$user" --gid "$user" \
            --chroot-base-dir "$work/jails" \
            --bind "$kernel:/kernel" --bind "$initrd:/initrd" --bind "$work/disk.img:/disk.img,rw" \
            -- --api-sock /api.sock &
    fi
    monitor=$!
    socket=$outside/api.sock console=$outside/console
    wait_for_api
}

wait_for_guest() {
    until grep -q "waiting for the power button" "$console" 2> /dev/null; do
        kill -0 "$monitor" || fail "the monitor has ended"
        sleep 0.2
    done
}

echo "== call by call"
start_monitor
api 200 GET /
says '"state":"Not started"'
api 204 PUT /machine-config '{"vcpu_count": 1, "mem_size_mib": 128}'
api 204 PATCH /machine-config '{"mem_size_mib": 256}'
api 204 PUT /boot-source "{\"kernel_image_path\": \"$inside/kernel\", \"initrd_path\": \"$inside/initrd\",
    \"boot_args\": \"$cmdline\"}"
api 204 PUT /drives/data "{\"drive_id\": \"data\", \"path_on_host\": \"$inside/disk.img\",
    \"is_root_device\": false, \"is_read_only\": false}"
api 204 PUT /vsock "{\"guest_cid\": 3, \"uds_path\": \"$inside/v.sock\"}"
api 204 PUT /serial "{\"serial_out_path\": \"$inside/console\"}"
api 200 GET /vm/config
says '"mem_size_mib":256'
# What is wrong is refused, and changes nothing.
api 400 PUT /machine-config '{"vcpu_count": 0, "mem_size_mib": 256}'
says '"fault_message":"machine-config.vcpu_count: '
api 400 PATCH /vm '{"state": "Paused"}'
begin_waiting
api 204 PUT /actions '{"action_type": "InstanceStart"}'
wait_for_guest
api 200 GET /vm
says '"state":"Running"'
says '"protected":false'
if [ "$mode" = jailed ]; then
    pid=$(cat "$outside/cofferdam-vmm.pid")
    grep -q "^Uid:	$user	$user	$user	$user\$" "/proc/$pid/status" || fail "the monitor runs as another user"
fi
api 204 PATCH /vm '{"state": "Paused"}'
api 200 GET /
says '"state":"Paused"'
api 204 PATCH /vm '{"state": "Resumed"}'
api 204 PUT /actions '{"action_type": "SendCtrlAltDel"}'
finish 0 power_off

echo "== in one body"
start_monitor
begin_waiting
api 204 PUT '/vm?start=true' "{
    \"boot-source\": {\"kernel_image_path\": \"$inside/kernel\", \"initrd_path\": \"$inside/initrd\",
        \"boot_args\": \"$cmdline\"},
    \"machine-config\": {\"vcpu_count\": 2, \"mem_size_mib\": 256},
    \"drives\": [{\"drive_id\": \"data\", \"path_on_host\": \"$inside/disk.img\"}],
    \"vsock\": {\"guest_cid\": 3, \"uds_path\": \"$inside/v.sock\"},
    \"serial\": {\"serial_out_path\": \"$inside/console\"},
    \"stop_timeout_ms\": 120000}"
wait_for_guest
api 200 GET '/vm/wait?timeout_ms=10'
says '"state":"Running"'
# Presses the power button too; after stop_timeout_ms it would stop the domain hard.
api 204 DELETE /vm
finish 143 stopped

echo "domain.sh: two domains ($mode) were driven to their ends"
