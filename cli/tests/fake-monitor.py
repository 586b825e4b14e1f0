"""A monitor with a container, for tests of `cofferdam run --container` and what talks to it.

It is started as the monitor is, connects to the container's streams as its vsock device would, and serves the API. What
it does is Python in $SCRIPT, with the functions below.
"""

import json, os, socket, sys, threading

option = {name: value for name, value in zip(sys.argv[1:], sys.argv[2:]) if name.startswith("--")}
descriptor = lambda name: int(option[name].removeprefix("fd:"))
config = json.load(os.fdopen(descriptor("--config-file")))
status = os.fdopen(descriptor("--status-file"), "w", buffering=1)
streams = config["vsock"]["uds_path"]
manifest = os.read(int(config["container"]["manifest"].removeprefix("fd:")), 1 << 20)
requests = []  # method, path and body of what the API was asked for, in order
asked = threading.Condition()
answers = {}  # path: status and body


def save(name, value):
    with open(name + ".new", "w") as file:
        file.write(value)
    os.rename(name + ".new", name)


def event(**fields):
    print(json.dumps(fields), file=status)


def running():
    event(event="running", platform="plain", protected=False)


def step(name):
    event(event="step", step=name)


def stopped(code, reason="power_off", message="off"):
    event(event="stopped", platform="plain", protected=False, exit_reason=reason, exit_code=code, message=message,
          phases={}, container={"manifest_digest": "00", "asserted_by_host": True, "step": None, "failure": None})


def connect(port):
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(f"{streams}_{port}")
    return stream


def read_all(stream):
    parts = []
    while part := stream.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def wait_for(path):
    """Waits until the API was asked for `path`, and returns the body."""
    with asked:
        asked.wait_for(lambda: any(request[1] == path for request in requests), timeout=120)
        found = [request for request in requests if request[1] == path]
        requests.remove(found[0])
        return found[0][2]


def serve(connection):
    with connection:
        text = b""
        while b"\r\n\r\n" not in text:
            text += connection.recv(4096) or exit()
        head, body = text.split(b"\r\n\r\n", 1)
        lines = head.decode().split("\r\n")
        length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")), 0)
        while len(body) < length:
            body += connection.recv(4096) or exit()
        method, path, _ = lines[0].split(" ")
        body = json.loads(body) if body else None
        code, answer = answers.get(path, (204, None))
        if callable(answer):
            answer = answer(body)
        answer = "" if answer is None else json.dumps(answer)
        try:
            connection.sendall(f"HTTP/1.1 {code} X\r\nContent-Length: {len(answer)}\r\n\r\n{answer}".encode())
        except OSError:
            pass  # who asked has gone
        # Only now: a script that has waited for this request may end at once, and with it this process.
        with asked:
            requests.append((method, path, body))
            asked.notify_all()


def api():
    listener = socket.socket(fileno=descriptor("--api-sock"))
    while True:
        threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()


threading.Thread(target=api, daemon=True).start()
exec(os.environ["SCRIPT"])
