# What the scripts in this folder share: requests by curl to a monitor, and its end. `mode` is plain or jailed; the jailed
# monitor runs as `user`. `work` is a folder that is removed at the end, `monitor` the process to be killed then. Whoever
# starts a monitor sets `socket`, its API, and `console`, the file of its console.
user=61237

work=$(mktemp -d)
monitor=
console=
trap '[ -z "$monitor" ] || kill -9 "$monitor" 2> /dev/null || :; rm -rf "$work"' EXIT

fail() {
    echo "$(basename "$0"): $*" >&2
    [ ! -f "$console" ] || tail -n 20 "$console" >&2
    exit 1
}

# The file is there a moment before anybody listens: ask until there is an answer.
wait_for_api() {
    until curl --silent --unix-socket "$socket" http://localhost/ > /dev/null; do
        kill -0 "$monitor" || fail "the monitor has ended"
        sleep 0.1
    done
}

# api STATUS METHOD PATH [BODY]: asks the monitor. Another status than STATUS ends the script; `answer` is the body.
api() {
    wanted=$1 method=$2 path=$3
    shift 3
    answer=$(curl --silent --show-error --max-time 300 --unix-socket "$socket" \
        --request "$method" "http://localhost$path" ${1+--data "$1"} --write-out '\n%{http_code}')
    status=${answer##*
}
    answer=${answer%
*}
    echo "$method $path -> $status $answer"
    [ "$status" = "$wanted" ] || fail "$method $path: $status instead of $wanted"
}

# The last answer has to have this in it.
says() {
    case $answer in
    *"$1"*) ;;
    *) fail "no $1 in: $answer" ;;
    esac
}

# A request that is answered when the domain has stopped.
begin_waiting() {
    curl --silent --show-error --unix-socket "$socket" http://localhost/vm/wait > "$work/end" &
    waiting=$!
}

# Waits for the end of the domain with a request that began before, and then for that of the monitor: its exit status
# has to be $1, the reason $2. `answer` is what the domain came to.
finish() {
    wait "$waiting"
    answer=$(cat "$work/end")
    echo "GET /vm/wait -> $answer"
    says "\"exit_reason\":\"$2\""
    status=0
    wait "$monitor" || status=$?
    monitor=
    [ "$status" = "$1" ] || fail "the monitor's exit status is $status instead of $1"
    [ ! -e "$socket" ] || fail "the socket is left behind"
    [ "$mode" = plain ] || [ -z "$(ls "$work/jails")" ] || fail "something of the jail is left behind"
    rm -rf "${work:?}"/*
}
