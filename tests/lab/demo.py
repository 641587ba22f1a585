# SPDX-License-Identifier: GPL-3.0-or-later
"""The product, shown on the lab: each step does something to the estate, makes real requests and counts.

Every figure in the table at the end was measured a moment before. Ends non-zero when a sentence is not true.
Run by `make demo`, after `isthmus.mesh.site`; `tests/e2e` asserts the same steps one by one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from isthmus_lab import Customer, Lab, LabError

NAME = "web.shop.svc.clusterset.local"
URL = f"http://{NAME}/"
SERVICE = ("shop", "web")
EDGE, ONPREM_CLIENT = "edge-1", "onprem-3"
SETTLE = 60.0  # seconds until a change must be seen everywhere


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A sentence of the story, what was measured, and whether the one bears out the other."""

    sentence: str
    measured: str
    true: bool


class Story:
    """The steps, in an order in which each leaves the estate as it found it."""

    def __init__(self, lab: Lab, say: Callable[[str], None]) -> None:
        self.lab = lab
        self.say = say
        self.edge = Customer(lab, EDGE)
        self.onprem = Customer(lab, ONPREM_CLIENT)

    # -- looking

    def ask(self, host: str, what: str) -> dict[str, Any]:
        """`isthmus <what> -o json` on a host."""
        document: dict[str, Any] = json.loads(self.lab.exec(host, ["isthmus", what, "-o", "json"]).stdout)
        return document

    def service(self, host: str, name: tuple[str, str] = SERVICE) -> dict[str, Any]:
        """A service as a host's agent has it in its kernel."""
        for service in self.ask(host, "services")["services"]:
            if (service["namespace"], service["name"]) == name:
                found: dict[str, Any] = service
                return found
        raise LabError(f"{host} knows no service {'/'.join(name)}; run: make site")

    def used(self, host: str, name: tuple[str, str] = SERVICE) -> set[str]:
        """Nodes whose backends of a service get new flows from this host."""
        return {b["node"] for b in self.service(host, name)["backends"] if b["used"] and b["reachable"]}

    def connects(self, host: str) -> dict[str, int]:
        """The kernel's counter of connects by backend node."""
        return {backend["node"]: backend["connects"] for backend in self.service(host)["backends"]}

    def until(self, what: str, true: Callable[[], bool], seconds: float = SETTLE) -> float:
        """Wait for a state; returns the seconds it took."""
        began = time.monotonic()
        last: Exception | None = None
        while True:
            try:
                if true():
                    return time.monotonic() - began
            except LabError as error:
                last = error  # an agent that is starting does not answer yet
            if time.monotonic() - began > seconds:
                raise LabError(f"{what}: not within {seconds:.0f} s{f' (last: {last})' if last else ''}")
            time.sleep(0.2)

    def everywhere(self, nodes: set[str], hosts: tuple[str, ...] = (EDGE, ONPREM_CLIENT)) -> float:
        return self.until(
            f"{', '.join(hosts)} use {', '.join(sorted(nodes))}",
            lambda: all(self.used(host) == nodes for host in hosts),
        )

    @property
    def backends(self) -> set[str]:
        return {host.name for host in self.lab.hosts.values() if "web.service" in host.units}

    def of_cluster(self, cluster: str) -> set[str]:
        return {name for name in self.backends if self.lab.hosts[name].cluster == cluster}

    @contextmanager
    def undone(self, undo: Callable[[], object]) -> Iterator[None]:
        """Whatever comes of the step, the estate is put right after it."""
        try:
            yield
        finally:
            undo()

    # -- the sentences

    def one_name(self) -> Iterator[Finding]:
        self.say(f"{EDGE} looks up {NAME}")
        lines = self.lab.exec(EDGE, ["getent", "ahostsv4", NAME]).stdout.splitlines()
        addresses = {line.split()[0] for line in lines}
        vip = self.service(EDGE)["address"]
        yield Finding(
            "DNS on edge, which has no backend, answers one virtual address",
            f"{', '.join(addresses)}",
            addresses == {vip},
        )

    def both_clusters(self) -> Iterator[Finding]:
        count = 400
        self.say(f"{EDGE} makes {count} requests, a connection each")
        before = self.connects(EDGE)
        result = self.edge.requests(URL, count)
        after = self.connects(EDGE)
        by_cluster = dict.fromkeys(("onprem", "cloud"), 0)
        for who, answers in result["answers"].items():
            by_cluster[who.split("/")[0]] += answers
        yield Finding(
            "both clusters answer",
            f"{result['ok']} of {count} answered: " + ", ".join(f"{c} {n}" for c, n in by_cluster.items()),
            result["ok"] == count and all(by_cluster.values()),
        )
        rise = {node: after[node] - before.get(node, 0) for node in after}
        answered = {who.split("/")[1]: n for who, n in result["answers"].items()}
        yield Finding(
            "the kernel chose, at connect(): its counters rose by what each backend answered",
            ", ".join(f"{node} +{n}" for node, n in sorted(rise.items())),
            rise == {node: answered.get(node, 0) for node in rise},
        )
        own = {w["address"] for w in self.ask(EDGE, "status")["workloads"] if w["name"] == "client"}
        yield Finding(
            "no proxy: the server sees the client workload's own mesh address",
            f"seen {', '.join(result['peers'])}; the workload has {', '.join(own)}",
            set(result["peers"]) == own,
        )
        addresses = {backend["address"] for backend in self.service(EDGE)["backends"]}
        rules = self.lab.exec(EDGE, ["nft", "list", "ruleset"]).stdout
        sockets = self.lab.exec(EDGE, ["ss", "-Htulnp"]).stdout
        named = {address for address in addresses if address in rules or address in sockets}
        yield Finding(
            "no nft rule and no listening process on edge names a backend",
            f"{len(named)} of {len(addresses)} backends named in {len(rules.splitlines())} lines of rules "
            f"and {len(sockets.splitlines())} sockets",
            not named,
        )

    def a_process_stops(self) -> Iterator[Finding]:
        victim = sorted(self.of_cluster("onprem"))[0]
        rest = self.backends - {victim}
        count = 400
        with self.undone(lambda: self.lab.exec(victim, ["systemctl", "start", "web.service"])):
            self.say(f"web.service on {victim} is stopped")
            self.lab.exec(victim, ["systemctl", "stop", "web.service"])
            took = self.everywhere(rest)
            result = self.edge.requests(URL, count)
            yield Finding(
                "a backend process stops: its health check takes it out, no further request fails",
                f"out after {took:.1f} s; then {result['failed']} of {count} failed",
                result["ok"] == count and not any(victim in who for who in result["answers"]),
            )
        self.say(f"web.service on {victim} is started")
        took = self.everywhere(self.backends)
        result = self.edge.requests(URL, count)
        answered = sum(n for who, n in result["answers"].items() if victim in who)
        yield Finding(
            "it returns and is used again",
            f"in after {took:.1f} s; then it answered {answered} of {result['ok']}",
            answered > 0 and result["ok"] == count,
        )

    def a_site_is_cut_off(self) -> Iterator[Finding]:
        cloud = "cloud-2"
        self.lab.exec(cloud, ["systemctl", "start", "client.service"])
        customers = {"edge": self.edge, "cloud": Customer(self.lab, cloud), "onprem": self.onprem}
        runs = [(name, kind) for name in customers for kind in ("new", "kept")]
        with self.undone(lambda: self.lab.exec(cloud, ["systemctl", "stop", "client.service"])):
            for name, kind in runs:
                customers[name].start(f"cut-{kind}", URL, interval=0.02, timeout=2.0, keep_alive=kind == "kept")
            self.say("requests run everywhere; the site onprem is cut off")
            with self.undone(lambda: self.lab.restore("onprem")):
                self.lab.cut("onprem")
                self.until(
                    "agents on both sides of the cut use the backends on theirs",
                    lambda: (
                        self.used(EDGE) == self.used(cloud) == self.of_cluster("cloud")
                        and self.used(ONPREM_CLIENT) == self.of_cluster("onprem")
                    ),
                )
                self.hold(4)
                results = {(n, k): customers[n].result(f"cut-{k}", stop=True) for n, k in runs}
                after = {name: customers[name].requests(URL, 200) for name in customers}
            for name in ("edge", "cloud"):
                gaps = {kind: results[(name, kind)]["longest_gap"] for kind in ("new", "kept")}
                clusters = {who.split("/")[0] for who in after[name]["answers"]}
                yield Finding(
                    f"onprem is cut off: {name} goes on with cloud's backends within 10 s",
                    f"longest gap {gaps['new']:.1f} s (new connections), {gaps['kept']:.1f} s (keep-alive); then "
                    f"{after[name]['failed']} of 200 failed, answered by {', '.join(clusters)}",
                    max(gaps.values()) <= 10 and after[name]["ok"] == 200 and clusters == {"cloud"},
                )
            gaps = {kind: results[("onprem", kind)]["longest_gap"] for kind in ("new", "kept")}
            clusters = {who.split("/")[0] for who in after["onprem"]["answers"]}
            yield Finding(
                "onprem's own machines go on with their local backends",
                f"longest gap {max(gaps.values()):.1f} s; then {after['onprem']['failed']} of 200 failed, "
                f"answered by {', '.join(clusters)}",
                max(gaps.values()) <= 10 and after["onprem"]["ok"] == 200 and clusters == {"onprem"},
            )
        took = self.everywhere(self.backends)
        yield Finding("the link is restored: onprem is used again", f"after {took:.1f} s", True)

    def an_etcd_stops(self) -> Iterator[Finding]:
        members = [host.name for host in self.lab.hosts.values() if host.cluster == "onprem"]

        def all_members(verb: str) -> None:
            # Not one after the other: a member alone does not become ready, and systemctl waits for that.
            for member in members:
                self.lab.exec(member, ["systemctl", verb, "--no-block", "isthmus-etcd.service"])

        runs = [(customer, kind) for customer in (self.edge, self.onprem) for kind in ("new", "kept")]
        self.say(f"onprem's etcd is stopped on {', '.join(members)}, requests go on")
        for customer, kind in runs:
            customer.start(f"etcd-{kind}", URL, interval=0.02, keep_alive=kind == "kept")
        with self.undone(lambda: all_members("start")):
            all_members("stop")
            self.hold(6)
            results = [customer.result(f"etcd-{kind}", stop=True) for customer, kind in runs]
        self.until("onprem's etcd answers", lambda: bool(self.ask(ONPREM_CLIENT, "status")["etcd"]["connected"]))
        yield self.nobody_noticed("onprem's etcd is stopped altogether: new and established connections go on", results)

    def agents_are_killed(self) -> Iterator[Finding]:
        victims = [EDGE, ONPREM_CLIENT, *sorted(self.backends)]
        runs = [(customer, kind) for customer in (self.edge, self.onprem) for kind in ("new", "kept")]
        for customer, kind in runs:
            customer.start(f"kill-{kind}", URL, interval=0.02, keep_alive=kind == "kept")
        self.say(f"every agent is killed with SIGKILL ({', '.join(victims)}), requests go on")
        for victim in victims:
            self.lab.exec(victim, ["systemctl", "kill", "--signal=KILL", "isthmusd.service"])
        self.hold(4)
        results = [customer.result(f"kill-{kind}", stop=True) for customer, kind in runs]
        yield self.nobody_noticed("agents are killed: new and established connections go on", results)
        self.everywhere(self.backends)

    def a_machine_reboots_without_etcd(self) -> Iterator[Finding]:
        count = 1000
        self.say(f"{EDGE} reboots while its cluster's etcd stays off; requests among the others go on")
        others = [(self.onprem, "new"), (self.onprem, "kept")]

        def etcd_back() -> None:
            self.lab.exec(EDGE, ["systemctl", "enable", "--now", "--quiet", "--no-block", "isthmus-etcd.service"])

        with self.undone(etcd_back):
            self.lab.exec(EDGE, ["systemctl", "disable", "--now", "--quiet", "isthmus-etcd.service"])
            for customer, kind in others:
                customer.start(f"boot-{kind}", URL, count=count, interval=0.005, keep_alive=kind == "kept")
            began = time.monotonic()
            self.lab.reboot(EDGE, hard=True)
            self.say(f"{EDGE} is up again after {time.monotonic() - began:.1f} s")
            self.until(f"{EDGE}'s agent works", lambda: self.used(EDGE) == self.backends)
            etcd = self.lab.exec(EDGE, ["systemctl", "is-active", "isthmus-etcd.service"], check=False).stdout.strip()
            outward = self.edge.requests(URL, count)
            # Somebody dials the rebooted machine: a server on its workload's address, called from onprem.
            address = next(w["address"] for w in self.ask(EDGE, "status")["workloads"] if w["name"] == "client")
            self.lab.exec(EDGE, ["systemctl", "start", "web.service"])
            with self.undone(lambda: self.lab.exec(EDGE, ["systemctl", "stop", "web.service"])):
                probe = ["curl", "-s", "-m", "1", f"http://{address}:8080/"]
                self.until("its server answers", lambda: self.lab.exec(EDGE, probe, check=False).returncode == 0, 10)
                inward = self.onprem.requests(f"http://{address}:8080/", count)
            results = [customer.result(f"boot-{kind}", wait=True) for customer, kind in others]
        yield Finding(
            "a machine reboots with its etcd down: it works again from last-known-good",
            f"etcd {etcd}; failed: {outward['failed']} of {count} from it, {inward['failed']} of {count} to it",
            outward["ok"] == inward["ok"] == count and etcd != "active",
        )
        yield self.nobody_noticed("connections among the others never noticed", results)
        self.until(f"{EDGE}'s etcd answers", lambda: bool(self.ask(EDGE, "status")["etcd"]["connected"]))

    def nobody_noticed(self, sentence: str, results: list[dict[str, Any]]) -> Finding:
        """`results` alternate: new connections, one kept connection. A kept one must be the same all the time."""
        failed, total = sum(r["failed"] for r in results), sum(r["ok"] + r["failed"] for r in results)
        kept = [result["connections"] for result in results[1::2]]
        gap = max(r["longest_gap"] for r in results)
        errors = {error for result in results for error in result["errors"]}
        words = f"{failed} of {total} failed, longest gap {gap:.2f} s, {sum(kept) - len(kept)} kept connections lost"
        words += f" ({'; '.join(sorted(errors))})" if errors else ""
        return Finding(sentence, words, not failed and total > 0 and set(kept) == {1})

    def hold(self, seconds: float) -> None:
        """Let the requests run for this long: a duration that is measured over, not a wait for a state."""
        time.sleep(seconds)

    STEPS = (
        "one_name",
        "both_clusters",
        "a_process_stops",
        "a_site_is_cut_off",
        "an_etcd_stops",
        "agents_are_killed",
        "a_machine_reboots_without_etcd",
    )


def print_table(findings: list[Finding]) -> None:
    left, right = 50, 58
    print(f"\n{'WHAT THE MESH PROMISES':{left}}  {'WHAT WAS MEASURED':{right}}\n{'-' * (left + right + 8)}")
    for finding in findings:
        sentences = textwrap.wrap(finding.sentence, left)
        figures = textwrap.wrap(finding.measured, right)
        for row in range(max(len(sentences), len(figures))):
            sentence = sentences[row] if row < len(sentences) else ""
            figure = figures[row] if row < len(figures) else ""
            verdict = ("true" if finding.true else "FALSE") if row == 0 else ""
            print(f"{sentence:{left}}  {figure:{right}}  {verdict}".rstrip())
    print()


def speaker() -> Callable[[str], None]:
    """Says what happens, with the seconds since now."""
    began = time.monotonic()
    return lambda text: print(f"demo: {time.monotonic() - began:5.1f} s  {text}", flush=True)


def tell(findings: Iterator[Finding], say: Callable[[str], None]) -> bool:
    """Tell a story to its end, then show all of it as a table; whether every sentence is true."""
    told: list[Finding] = []
    problem = ""
    began = time.monotonic()
    try:
        for finding in findings:
            told.append(finding)
            say(f"  -> {'true' if finding.true else 'FALSE'}: {finding.sentence}: {finding.measured}")
    except LabError as error:
        problem = str(error)
    print_table(told)
    if problem:
        print(f"demo: the story ended early: {problem}", file=sys.stderr)
    if problem or not all(finding.true for finding in told):
        print("demo: look at it with `make lab-exec HOST=edge-1 CMD='isthmus status'`", file=sys.stderr)
        return False
    print(f"demo: {len(told)} sentences proven in {time.monotonic() - began:.0f} s. The lab is up:")
    return True


def main() -> int:
    say = speaker()
    story = Story(Lab(), say)

    def findings() -> Iterator[Finding]:
        say("waiting until every agent uses every backend")
        story.everywhere(story.backends)
        for step in Story.STEPS:
            yield from getattr(story, step)()

    if not tell(findings(), say):
        return 1
    print("demo:   make lab-exec HOST=edge-1 CMD='isthmus services'   (or status, peers)")
    print("demo:   tests/lab/lab ssh edge-1                           (a shell)")
    print("demo:   make lab-down                                      (removes it without a trace)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
