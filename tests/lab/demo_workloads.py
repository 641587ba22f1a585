# SPDX-License-Identifier: GPL-3.0-or-later
"""The operator's applications on lab machines: nothing of Isthmus, only things to serve and to call.

`web.service` answers HTTP on 8080, `batch.service` is a second workload of another identity on the same
host (it answers HTTP on 8081), `echo.service` sends UDP datagrams back on 7007. Each listens on
ADDRESS from /etc/default/<name> (default: every address).
"""

from __future__ import annotations

UNITS = ("web.service", "batch.service", "echo.service")

HTTP_SERVER = '''\
#!/usr/bin/python3
"""GET / says who answers and whom it saw; GET /healthz says ok, or 503 while /run/<unit>.sick exists."""
import http.server
import json
import os
import socket
import sys

NAME = sys.argv[1]


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
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    allow_reuse_address = True


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

UNIT = """\
[Unit]
Description={description}
After=network.target

[Service]
Environment=CLUSTER={cluster} PORT={port}
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
    made: dict[str, tuple[str, int]] = {http[1:]: (HTTP_SERVER, 0o755), udp[1:]: (UDP_SERVER, 0o755)}
    table = (
        ("web", 8080, f"{http} web", "The shop's web server"),
        ("batch", 8081, f"{http} batch", "The shop's batch worker"),
        ("echo", 7007, udp, "UDP echo"),
    )
    for name, port, command, description in table:
        unit = UNIT.format(description=description, cluster=cluster, port=port, name=name, command=command)
        made[f"etc/systemd/system/{name}.service"] = (unit, 0o644)
    return made
