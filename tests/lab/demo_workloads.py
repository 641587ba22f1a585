# SPDX-License-Identifier: GPL-3.0-or-later
"""The operator's applications on lab machines: nothing of Isthmus, only things to serve and to call.

`web.service` answers HTTP on 8080, `batch.service` is a second workload of another identity on the same
host (it answers HTTP on 8081), `echo.service` sends UDP datagrams back on 7007. Each listens on
ADDRESS from /etc/default/<name> (default: every address).

`client.service` is a customer: it makes HTTP requests on demand and counts the answers. Its control socket
/run/client.sock takes one JSON request a line (`Customer` in isthmus_lab.py speaks it).
"""

from __future__ import annotations

UNITS = ("web.service", "batch.service", "echo.service", "client.service")

HTTP_SERVER = '''\
#!/usr/bin/python3
"""GET / says who answers and whom it saw; GET /healthz says ok, or 503 while /run/<unit>.sick exists.

With DRAIN=<seconds> SIGTERM ends it only after these: connections are answered and then closed meanwhile.
"""
import http.server
import json
import os
import signal
import socket
import sys
import threading

NAME = sys.argv[1]
LEAVING = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True

    def do_GET(self):
        sick = os.path.exists(f"/run/{NAME}.sick")
        if self.path == "/healthz":
            status, body = (503, "sick\\n") if sick else (200, "ok\\n")
        else:
            answer = {
                "service": NAME,
                "host": socket.gethostname(),
                "cluster": os.environ["CLUSTER"],
                "peer": self.client_address[0].removeprefix("::ffff:"),
                "local": self.connection.getsockname()[0],
                "path": self.path,
            }
            if self.path.startswith("/bytes/"):
                status, body = 200, "x" * int(self.path.rsplit("/", 1)[1])
            else:
                status, body = 200, json.dumps(answer) + "\\n"
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if LEAVING.is_set():
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    allow_reuse_address = True


def leave(*_):
    LEAVING.set()
    threading.Timer(float(os.environ["DRAIN"]), os._exit, (0,)).start()


if "DRAIN" in os.environ:
    signal.signal(signal.SIGTERM, leave)
Server((os.environ.get("ADDRESS", "0.0.0.0"), int(os.environ["PORT"])), Handler).serve_forever()
'''

UDP_SERVER = '''\
#!/usr/bin/python3
"""Sends every datagram back from the address it came to, with the host's name and the peer it saw."""
import os
import socket

IP_PKTINFO = 8
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
sock.bind((os.environ.get("ADDRESS", "0.0.0.0"), int(os.environ["PORT"])))
while True:
    data, ancillary, _, peer = sock.recvmsg(65536, 512)
    answer = b"%s %s %s" % (socket.gethostname().encode(), peer[0].encode(), data)
    control = []
    for level, kind, info in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            # struct in_pktinfo: interface (0: by route), source address, header's address.
            control = [(level, kind, b"\\0" * 4 + info[8:12] + b"\\0" * 4)]
    sock.sendmsg([answer], control, 0, peer)
'''

CLIENT = '''\
#!/usr/bin/python3
"""Makes requests on demand and counts. One JSON object a line on /run/client.sock, one answer each:

{"run": NAME, "url": ..., "count": N, "interval": SECONDS, "timeout": SECONDS, "keep_alive": false}
    count 0: until stopped. Answers at once; the requests go on in the background.
{"result": NAME, "stop": BOOL, "wait": BOOL}
    what was counted until now; stop ends it first, wait waits for its end.
"""
import http.client
import json
import os
import socket
import socketserver
import threading
import time
import urllib.parse

JOBS = {}


class Job(threading.Thread):
    def __init__(self, order):
        super().__init__(daemon=True)
        self.order = order
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.answers, self.peers, self.errors = {}, {}, {}
        self.ok = self.failed = self.connections = 0
        self.began = self.last_ok = time.monotonic()
        self.longest_gap = 0.0
        self.changes = []  # [seconds since start, who answered or which error], at each change
        self.failures = []  # [when it began (UTC), what was done, error], the first hundred
        self.connection = None

    def run(self):
        url = urllib.parse.urlsplit(self.order["url"])
        count, interval = self.order.get("count", 0), self.order.get("interval", 0.0)
        done = 0
        while not self.stopped.is_set() and (count == 0 or done < count):
            began = time.monotonic()
            self.request(url)
            done += 1
            left = interval - (time.monotonic() - began)
            if left > 0:
                self.stopped.wait(left)
        with self.lock:
            self.gap(time.monotonic())
        self.close()

    def close(self):
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def gap(self, now):
        self.longest_gap = max(self.longest_gap, now - self.last_ok)

    def request(self, url):
        timeout = self.order.get("timeout", 2.0)
        began, doing = time.strftime("%H:%M:%S", time.gmtime()), "asking"
        try:
            if self.connection is None:
                doing = "connecting"
                self.connection = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=timeout)
                self.connection.connect()
                self.connection.auto_open = 0  # a connection that was lost is an error, never opened again in silence
                self.connections += 1
                doing = "asking"
            self.connection.request("GET", url.path or "/")
            response = self.connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise http.client.HTTPException(f"HTTP {response.status}")
            answer = json.loads(body)
            who, error = answer["cluster"] + "/" + answer["host"], None
            if response.will_close:
                self.close()
        except (OSError, http.client.HTTPException) as failure:
            who, error = None, type(failure).__name__ + ": " + str(failure)
        if error is not None or not self.order.get("keep_alive"):
            self.close()
        now = time.monotonic()
        with self.lock:
            if error is None:
                self.ok += 1
                self.gap(now)
                self.last_ok = now
                self.answers[who] = self.answers.get(who, 0) + 1
                self.peers[answer["peer"]] = self.peers.get(answer["peer"], 0) + 1
            else:
                self.failed += 1
                self.errors[error] = self.errors.get(error, 0) + 1
                if len(self.failures) < 100:
                    self.failures.append([began, doing, error])
            what = who or error
            if not self.changes or self.changes[-1][1] != what:
                if len(self.changes) < 10000:
                    self.changes.append([round(now - self.began, 3), what])

    def result(self):
        with self.lock:
            if self.is_alive():
                self.gap(time.monotonic())
            return {
                "ok": self.ok, "failed": self.failed, "answers": self.answers, "peers": self.peers,
                "errors": self.errors, "failures": self.failures, "changes": self.changes,
                "longest_gap": round(self.longest_gap, 3),
                "seconds": round(time.monotonic() - self.began, 3), "connections": self.connections,
            }


class Control(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            order = json.loads(line)
            if "run" in order:
                job = JOBS[order["run"]] = Job(order)
                job.start()
                answer = {"started": order["run"]}
            else:
                job = JOBS[order["result"]]
                if order.get("stop"):
                    job.stopped.set()
                if order.get("stop") or order.get("wait"):
                    job.join()
                answer = job.result()
            self.wfile.write(json.dumps(answer).encode() + b"\\n")


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


if os.path.exists("/run/client.sock"):
    os.unlink("/run/client.sock")
Server("/run/client.sock", Control).serve_forever()
'''

UNIT = """\
[Unit]
Description={description}
After=network.target

[Service]
{slice}Environment=CLUSTER={cluster} PORT={port}
EnvironmentFile=-/etc/default/{name}
ExecStart={command}
Restart=on-failure
RestartSec=1

[Install]
WantedBy=multi-user.target
"""


def files(cluster: str) -> dict[str, tuple[str, int]]:
    """Path in the machine -> (text, mode)."""
    http = "/usr/local/lib/demo/http_server"
    udp = "/usr/local/lib/demo/udp_server"
    client = "/usr/local/lib/demo/client"
    made: dict[str, tuple[str, int]] = {
        http[1:]: (HTTP_SERVER, 0o755),
        udp[1:]: (UDP_SERVER, 0o755),
        client[1:]: (CLIENT, 0o755),
    }
    table = (
        ("web", 8080, f"{http} web", "The shop's web server"),
        ("batch", 8081, f"{http} batch", "The shop's batch worker"),
        ("echo", 7007, udp, "UDP echo"),
        ("client", 0, client, "A customer of the shop"),
    )
    for name, port, command, description in table:
        # The customer is a workload by its slice: whatever else runs there has the same address.
        inside = "Slice=client.slice\n" if name == "client" else ""
        unit = UNIT.format(
            description=description, slice=inside, cluster=cluster, port=port, name=name, command=command
        )
        made[f"etc/systemd/system/{name}.service"] = (unit, 0o644)
    return made
