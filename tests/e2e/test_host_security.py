# SPDX-License-Identifier: GPL-3.0-or-later
"""A host as SECURITY.md and docs/ports.md describe it: its sandboxes, its sockets, and what its other users can do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from demo import EDGE
from estate_tools import ETCD_HOSTS, PKI, Estate
from playbook import ROOT
from security_page import STATED

pytestmark = [pytest.mark.root, pytest.mark.lab]

MEMBERS = tuple(host for hosts in ETCD_HOSTS.values() for host in hosts)
LOOK = Path(__file__).with_name("look_locally.py").read_text()
# With etcd and without, with systemd-resolved (cloud, edge) and without.
PLACES = ("onprem-1", "cloud-2", EDGE)

SOCKETS = """set -e
ss -Hltunp | while read -r line; do
  pid=$(echo "$line" | sed -n 's/.*pid=\\([0-9]*\\),.*/\\1/p')
  echo "$(ps -o unit= -p "${pid:-0}" 2>/dev/null || echo kernel) $(echo "$line" | awk '{print $1, $5}')"
done
"""


def look(
    estate: Estate, host: str, user: str = "root", group: str = "root", found: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a user can do there, to what root `found`."""
    become = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--"]
    given = {what: found[what] for what in ("secrets", "pins")} if found else {}
    done = estate.lab.exec(host, [*become, "python3", "-c", LOOK], feed=json.dumps(given))
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("host", PLACES)
def test_other_users_read_no_secret_and_change_nothing(estate: Estate, host: str) -> None:
    root = look(estate, host)
    # What is to be refused is there, and the look finds it.
    assert {f"{PKI}/agent.key", "/var/lib/isthmus/agent/last-known-good.json"} <= set(root["read"])
    assert root["read"] == root["secrets"]
    assert root["opened"] == root["pins"]
    assert {"/sys/fs/bpf/isthmus/v1/svc", "/sys/fs/bpf/isthmus/v1/links/connect4"} <= set(root["pins"])
    assert root["connected"] is True
    assert {"/etc/isthmus/node.json", "/run/isthmus/dns/hosts"} <= set(root["writable"])
    nobody = look(estate, host, "nobody", "nogroup", root)
    assert [nobody[what] for what in ("read", "opened", "connected", "writable")] == [[], [], False, []]
    if host in MEMBERS:
        etcd = look(estate, host, "isthmus-etcd", "isthmus-etcd", root)
        assert {f"{PKI}/ca.key", f"{PKI}/root.key", f"{PKI}/operator.key"} & set(root["secrets"])
        assert {path for path in etcd["read"] if path.endswith(".key")} == {
            f"{PKI}/etcd-peer.key",
            f"{PKI}/etcd-server.key",
        }
        others = ("/var/lib/isthmus/agent/", "/var/lib/isthmus/registrar/", "/var/lib/isthmus/snapshots/")
        assert [path for path in etcd["read"] if path.startswith(others)] == []
        assert (etcd["opened"], etcd["connected"]) == ([], False)
        own = ("/var/lib/isthmus/etcd", f"{PKI}/etcd-")
        assert [path for path in etcd["writable"] if not path.startswith(own)] == []


def sockets(estate: Estate, host: str) -> dict[str, set[str]]:
    """Listening sockets by the unit whose process holds them; `every` stands for all addresses of the host."""
    found: dict[str, set[str]] = {}
    for line in estate.lab.exec(host, ["sh", "-c", SOCKETS]).stdout.splitlines():
        unit, protocol, place = line.split()
        address, _colon, port = place.rpartition(":")
        address = "every" if address in ("*", "0.0.0.0", "[::]") else address.partition("%")[0]  # noqa: S104
        found.setdefault(unit, set()).add(f"{protocol} {address}:{port}")
    return found


@pytest.mark.parametrize("host", [*PLACES, "cloud-1"])
def test_sockets_are_bound_where_the_page_says(estate: Estate, host: str) -> None:
    spec = json.loads(estate.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)
    names = spec["node"]["mesh4"] if estate.lab.hosts[host].resolved else "127.0.0.73"
    wanted = {
        "kernel": {"udp every:8472"},
        "isthmusd.service": {"tcp 127.0.0.1:9968"},
        "isthmus-dns.service": {f"udp {names}:53", f"tcp {names}:53"},
    }
    if host in MEMBERS:
        wanted["isthmus-etcd.service"] = {"tcp every:2379", "tcp every:2380"}
    page = (ROOT / "docs" / "ports.md").read_text()
    for place in ("UDP 8472", "TCP 2379", "TCP 2380", "127.0.0.1:9968", "127.0.0.73", "`/run/isthmus/agent.sock`"):
        assert place in page

    def ours() -> dict[str, set[str]]:
        found = sockets(estate, host)
        return {unit: places for unit, places in found.items() if unit.startswith("isthmus") or unit == "kernel"}

    # For a moment a name server has a socket for each question that it passes on.
    estate.until(f"{host}: {wanted}, not {ours()}", lambda: ours() == wanted, 5)
    listening = estate.lab.exec(host, ["ss", "-Hlx"]).stdout
    assert set(re.findall(r"\S*isthmus\S*", listening)) == {"/run/isthmus/agent.sock"}


@pytest.mark.parametrize("host", [EDGE, "cloud-2"])
def test_running_units_keep_the_stated_score(estate: Estate, host: str) -> None:
    """With every drop-in that there is on the host; the units' own text has a unit test."""
    everywhere = ("isthmusd.service", "isthmus-dns.service")
    encrypts = {"isthmus-wireguard.service", "isthmus-ipsec-keeper.service"}  # the lab's estate does not
    members = STATED.keys() - encrypts
    units = members if host in MEMBERS else everywhere
    for unit in units:
        told = estate.lab.exec(host, ["systemd-analyze", "security", "--no-pager", unit], check=False).stdout
        [score] = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", told)
        assert float(score) <= STATED[unit], unit


def test_the_defragmentation_works_in_its_sandbox(estate: Estate) -> None:
    estate.lab.exec(EDGE, ["systemctl", "start", "isthmus-etcd-defrag.service"])  # waits for it, fails when it does
    told = estate.lab.exec(EDGE, ["journalctl", "-u", "isthmus-etcd-defrag", "-o", "cat", "-n", "20"]).stdout
    assert re.search(r"^nothing to do: |^\d+ bytes became \d+$", told, re.MULTILINE), told
