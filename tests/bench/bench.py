# SPDX-License-Identifier: GPL-3.0-or-later
"""Figures of the lab's estate, each beside a baseline of the same run and their ratio. Gates nothing.

All six machines share this machine's cores, so the ratios mean something, and the figures only here.
Run by `make bench`, on a lab with the estate on it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "lab")]

from demo import EDGE, ONPREM_CLIENT, URL, Story  # noqa: E402
from isthmus_lab import Lab, LabError  # noqa: E402
from playbook import INVENTORY, environment, play  # noqa: E402

ROUNDS = 5
CONNECTS = 2000
SECONDS = 1.0  # of sending, a round; a fixed size would be over in no time on a fast way
PORT = 5900

# Median microseconds of connect() and close(), a round for each address in turn, so that a busy moment hits both.
CONNECT = """
import json, socket, statistics, sys, time
targets, count, rounds = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
found = {name: [] for name in targets}
for _ in range(rounds):
    for name, (address, port) in targets.items():
        for _ in range(count // rounds):
            began = time.perf_counter()
            socket.create_connection((address, port), 5).close()
            found[name].append(time.perf_counter() - began)
print(json.dumps({name: statistics.median(times) * 1e6 for name, times in found.items()}))
"""

SINK = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
for _ in range(int(sys.argv[2])):
    connection, _ = server.accept()
    while connection.recv(1 << 20):
        pass
    connection.sendall(b"!")
    connection.close()
"""

# Mbit/s of one connection, the best round of each address; all has arrived when the time is taken.
SEND = """
import json, socket, sys, time
targets, port, seconds, rounds = json.loads(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
block = bytes(1 << 20)
best = dict.fromkeys(targets, 0.0)
order = [*targets.items()]
for _ in range(rounds):
    for name, address in order:
        connection = socket.create_connection((address, port), 10)
        began, sent = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            connection.sendall(block)
            sent += 1
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        best[name] = max(best[name], sent * 8.388608 / (time.perf_counter() - began))
    order.append(order.pop(0))  # each round begins with another one
print(json.dumps(best))
"""


class Bench(Story):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab, lambda text: print(f"bench: {text}", flush=True))
        self.rows: list[tuple[str, str, str, str]] = []

    def row(self, what: str, figure: float, baseline: float, unit: str, of: str) -> None:
        self.rows.append((what, f"{figure:.4g} {unit}", f"{baseline:.4g} {unit} ({of})", f"{figure / baseline:.2f}"))
        self.say(f"{what}: {self.rows[-1][1]}; baseline {self.rows[-1][2]}; ratio {self.rows[-1][3]}")

    @contextlib.contextmanager
    def serving(self, host: str, unit: str, program: str, port: int, connections: int) -> Iterator[None]:
        """A program of this page listens on a port of the host until it had so many connections."""
        run = ["systemd-run", "--quiet", "--collect", f"--unit={unit}", "/usr/bin/python3", "-c", program]
        self.lab.exec(host, [*run, str(port), str(connections)])
        try:
            listening = ["ss", "-Htln", f"sport = :{port}"]
            self.until(f"{unit} listens", lambda: bool(self.lab.exec(host, listening).stdout), 10)
            yield
        finally:
            self.lab.exec(host, ["systemctl", "stop", f"{unit}.service"], check=False)

    def prepared(self) -> contextlib.AbstractContextManager[None]:
        """What the steps need beside the estate."""
        return contextlib.nullcontext()

    def table(self) -> None:
        print(f"\n{'FIGURE':38}  {'MEASURED':14}  {'BASELINE':40}  RATIO")
        for what, figure, baseline, ratio in self.rows:
            print(f"{what:38}  {figure:14}  {baseline:40}  {ratio}")

    def python(self, host: str, program: str, *words: str) -> Any:
        """What a program prints as JSON that runs as the workload `client` of the host."""
        run = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--slice=client.slice"]
        return json.loads(self.lab.exec(host, [*run, "/usr/bin/python3", "-c", program, *words], seconds=300).stdout)

    def connect(self) -> None:
        service = self.service(EDGE)
        near = next(b for b in service["backends"] if b["cluster"] == "cloud")
        targets = {"service": (service["address"], 80), "backend": (near["address"], near["port"])}
        found = self.python(EDGE, CONNECT, json.dumps(targets), str(CONNECTS), str(ROUNDS))
        self.row("connect() to a service", found["service"], found["backend"], "us", "to a backend's own address")

    def bulk(self) -> None:
        host = self.lab.hosts["cloud-1"]
        mesh = next(w["address"] for w in self.ask("cloud-1", "status")["workloads"] if w["name"] == "web")
        targets = json.dumps({"mesh": mesh, "underlay": str(host.address)})
        with self.serving("cloud-1", "bench-sink", SINK, PORT, 2 * ROUNDS):
            found = self.python(EDGE, SEND, targets, str(PORT), str(SECONDS), str(ROUNDS))
        self.row("bulk over the overlay", found["mesh"], found["underlay"], "Mbit/s", "over the underlay")

    def backend_stops(self) -> None:
        victim = sorted(self.of_cluster("onprem"))[0]
        rest = self.backends - {victim}
        with self.undone(lambda: self.lab.exec(victim, ["systemctl", "start", "web.service"])):
            self.lab.exec(victim, ["systemctl", "stop", "web.service"])
            took = self.everywhere(rest)
        self.everywhere(self.backends)
        # fall 2 at an interval of 1 s: what two checks take, on average half an interval after the stop.
        self.row("a stopped backend is out everywhere", took, 1.5, "s", "its health check alone")

    def site_cut(self) -> None:
        self.edge.start("bench-cut", URL, interval=0.02, timeout=1.0)
        with self.undone(lambda: self.lab.restore("onprem")):
            self.lab.cut("onprem")
            self.until("edge uses cloud alone", lambda: self.used(EDGE) == self.of_cluster("cloud"))
            result = self.edge.result("bench-cut", stop=True)
        self.everywhere(self.backends)
        self.row("longest gap when a site is cut off", result["longest_gap"], 10.0, "s", "the promised figure")

    def site(self) -> None:
        began = time.monotonic()
        run = play("site")
        took = time.monotonic() - began
        if run.changed:
            raise LabError(f"the estate was not converged: {run.changed}")
        tool = Path(sys.executable).with_name("ansible")
        began = time.monotonic()
        ping = [str(tool), "-i", str(INVENTORY), "all", "-m", "ansible.builtin.ping"]
        subprocess.run(ping, check=True, capture_output=True, env=environment(), cwd="/")
        self.row("site on a converged estate", took, time.monotonic() - began, "s", "ansible -m ping")

    def agent(self) -> None:
        pid = self.lab.exec(EDGE, ["systemctl", "show", "--value", "-p", "MainPID", "isthmusd"]).stdout.strip()
        memory = f"awk '/^Rss/ {{ print $2 }}' /proc/{pid}/smaps_rollup"
        bare = "/usr/bin/python3 -c \"print(open('/proc/self/smaps_rollup').read().split('Rss:')[1].split()[0])\""
        rss = [float(self.lab.exec(EDGE, ["sh", "-c", words]).stdout) / 1024 for words in (memory, bare)]
        self.row("agent, resident memory", rss[0], rss[1], "MiB", "an empty Python process")

    STEPS: tuple[str, ...] = ("connect", "bulk", "backend_stops", "site_cut", "site", "agent")


def measure(bench: Bench) -> int:
    """Every step of a bench, or those that are named on the command line, then its table; the process's exit status."""
    try:
        bench.everywhere(bench.backends, (EDGE, ONPREM_CLIENT))
    except LabError as error:
        print(f"bench: {error}; next: make lab-up site", file=sys.stderr)
        return 1
    with bench.prepared():
        steps: list[Callable[[], None]] = [getattr(bench, name) for name in sys.argv[1:] or bench.STEPS]
        for step in steps:
            step()
    bench.table()
    return 0


if __name__ == "__main__":
    sys.exit(measure(Bench(Lab())))
