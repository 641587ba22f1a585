# SPDX-License-Identifier: GPL-3.0-or-later
"""`site` on a machine whose kernel is Debian's own and one of the lab's kind: the same roles make WireGuard and ESP in
the kernel on the one, and in user space on the other, whose kernel has neither."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bpf.topology import wait_for
from isthmus_lab import Lab
from kernel.stock_kernel import needed
from kernel.stock_machine import running
from playbook import play
from router_capture import packets, recorded

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

INVENTORY = Path(__file__).with_name("inventory")
CONSOLE = Path(__file__).resolve().parents[2] / "build" / "kernel-machine.log"
STOCK, PLAIN = "stock-1", "plain-1"
SITE = 600
"""Seconds that a run takes where every module's Python is emulated."""
SECRET = "of-the-test-and-long-enough-for-a-key-of-32"  # noqa: S105


@dataclass(frozen=True)
class Two:
    lab: Lab

    def run(self, host: str, *words: str) -> str:
        done = subprocess.run([*self.lab.ssh(host), *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{host}: {words}: {done.stderr}"
        return done.stdout

    def status(self, host: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(host, "isthmus", "status", "-o", "json"))
        return found

    def workload(self, host: str, name: str) -> str:
        (address,) = (each["address"] for each in self.status(host)["workloads"] if each["name"] == name)
        return str(address)

    def asks(self, host: str, address: str) -> dict[str, Any]:
        """What a web server of the mesh says to the client workload of a host."""
        words = ("systemd-run", "--pipe", "--quiet", "--wait", "--slice=client.slice")
        answer: dict[str, Any] = json.loads(
            self.run(host, *words, "curl", "--silent", "--fail", "--max-time", "30", f"http://{address}:8080/")
        )
        return answer

    def crossed(self) -> None:
        """Requests both ways, seen with the address of the workload that sent them."""
        for here, there in ((STOCK, PLAIN), (PLAIN, STOCK)):
            answer = self.asks(here, self.workload(there, "web"))
            assert (answer["host"], answer["peer"]) == (there, self.workload(here, "client"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """Bare machines: the one in the virtual machine, the other beside it."""
    kernel = needed()
    lab = Lab(INVENTORY)
    lab.down()
    lab.refuse_if_lacking()
    CONSOLE.parent.mkdir(exist_ok=True)
    patch = pytest.MonkeyPatch()
    # Machines of the lab that was there had these addresses: no session with them is to be used.
    patch.setenv("ANSIBLE_SSH_CONTROL_PATH_DIR", str(tmp_path_factory.mktemp("ssh")))
    try:
        with lab.locked():
            lab.make_ground(list(lab.hosts.values()))
            lab.boot_all([lab.host(PLAIN)])
        with running(lab, lab.host(STOCK), kernel, tmp_path_factory.mktemp("machine"), CONSOLE):
            yield Two(lab)
    finally:
        patch.undo()
        lab.down()


@pytest.mark.parametrize(
    ("routing", "encryption", "port"),
    [
        ("tunnel", "wireguard", "udp port 51871"),
        ("native", "wireguard", "udp port 51871"),
        ("tunnel", "ipsec-gateway", "udp port 4500 or ip proto 50"),
    ],
)
def test_a_stock_kernel_meets_another(
    two: Two, routing: str, encryption: str, port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    given = {
        "stock_routing": routing,
        "stock_encryption": encryption,
        "isthmus_ipsec_secrets": {"plain stock": SECRET},
    }
    words = ("-e", json.dumps(given))
    play("site", *words, inventory=INVENTORY, seconds=3 * SITE)
    # An agent that has just started has not met the other yet.
    wait_for(lambda: all(node["probe"] != "down" for node in two.status(STOCK)["nodes"]), "the nodes meet", 60)
    file = tmp_path / "between.pcap"
    with recorded(file, "ip and not tcp port 22"):
        two.crossed()
        verified = play("verify", *words, inventory=INVENTORY, seconds=3 * SITE)
    with capsys.disabled():
        print(f"\n{routing}, {encryption}: {time.monotonic() - began:.0f} s")
    assert verified.status == 0
    assert packets(file, port) > 20
    assert packets(file, "udp dst port 8472 or net 10.101.0.0/16 or net 10.102.0.0/16") == 0, "in clear"
    if encryption == "wireguard":
        made = {host: two.status(host)["wireguard"]["implementation"] for host in (STOCK, PLAIN)}
        assert made == {STOCK: "kernel", PLAIN: "wireguard-go"}
        assert "wireguard" in two.run(STOCK, "ip", "-d", "link", "show", "type", "wireguard")
    else:
        assert two.run(STOCK, "ip", "xfrm", "state").count("proto esp") >= 2
        # A kernel without ESP may refuse even the question.
        assert not two.run(PLAIN, "sh", "-c", "'ip xfrm state 2>/dev/null || true'")
