# SPDX-License-Identifier: GPL-3.0-or-later
"""What is opened in a firewall that the operator lets us manage, and taken away again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.filter import blocked_ports
from ansible_collections.isthmus.mesh.plugins.module_utils import files, firewall
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.openings import rules

Zones = dict[str, list[str]]


class Host:
    """ufw and firewalld of a host as AnsibleModule starts them; `ran` are the commands that change something."""

    def __init__(self) -> None:
        self.check_mode = False
        self.ran: list[str] = []
        self.ufw: list[str] = []
        self.firewalld: dict[str, Zones] | None = None
        self.zone = "public"
        self.broken = ""
        self.programs = {"ufw", "firewall-cmd"}

    def get_bin_path(self, name: str, **_more: Any) -> str | None:
        return f"/usr/sbin/{name}" if name in self.programs else None

    def fail_json(self, msg: str, **_more: Any) -> None:
        raise AssertionError(msg)

    def run_command(self, words: list[str], **_more: Any) -> tuple[int, str, str]:
        tool, *rest = words
        if self.broken and self.broken in words:
            return 1, "", "ERROR: problem running"
        if tool == "ufw":
            return 0, self._ufw(rest), ""
        if tool == "firewall-cmd" and self.firewalld is not None:
            code, out = self._firewalld(self.firewalld, rest)
            return code, out, ""
        return 252, "", "not running"

    def _ufw(self, words: list[str]) -> str:
        if words == ["status"]:
            return "Status: active\n"
        if words == ["show", "added"]:
            return "Added user rules (see 'ufw status' for running firewall):\n" + "".join(f"{x}\n" for x in self.ufw)
        self.ran.append("ufw " + " ".join(words))
        if words[0] == "delete":
            text = "ufw " + " ".join(words[1:])
            self.ufw = [line for line in self.ufw if line.partition(" comment ")[0] != text]
        else:
            text, _comment, comment = " ".join(words).partition(" comment ")
            self.ufw.append(f"ufw {text} comment '{comment}'")
        return ""

    def _firewalld(self, state: dict[str, Zones], words: list[str]) -> tuple[int, str]:
        mode = "permanent" if "--permanent" in words else "runtime"
        words = [word for word in words if word != "--permanent"]
        if words[0] == "--state":
            return 0, "running\n"
        if words[0].startswith("--get-"):
            return 0, self.zone + "\n"
        zone = state[mode].setdefault(words[0].removeprefix("--zone="), [])
        if words[1] == "--list-rich-rules":
            return 0, "".join(f"{rule}\n" for rule in zone if rule.startswith("rule "))
        if words[1].startswith("--query-interface="):
            return (0 if words[1].partition("=")[2] in zone else 1), ""
        self.ran.append(f"{mode} {len(words) - 1}")
        for word in words[1:]:
            verb, _equals, rule = word.partition("=")
            if verb.startswith("--add"):
                zone.append(rule)
            else:
                zone.remove(rule)
        return 0, ""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(firewall, "UFW_CONF", str(tmp_path / "ufw.conf"))
    monkeypatch.setattr(firewall, "STATE", str(tmp_path / "firewalld.json"))
    (tmp_path / "ufw.conf").write_text("ENABLED=yes\n")
    return Host()


A, B = ("tcp", 2379, "192.0.2.1"), ("udp", 8472, "192.0.2.2")


def opened(
    host: Host,
    *wanted: firewall.Rule,
    check: bool = False,
    tunnels: tuple[str, ...] = (),
    native: tuple[str, tuple[str, ...]] = ("", ()),
) -> files.Changes:
    host.check_mode = check
    changes = files.Changes(host)
    firewall.open_for(host, changes, wanted, "eth0", 8472, tunnels, native)
    return changes


def closed(host: Host, check: bool = False) -> list[str]:
    host.check_mode = check
    return firewall.close(host, files.Changes(host))


def test_ufw_is_opened_once_for_the_hosts_that_are_wanted_and_closed_again(host: Host) -> None:
    """Predicted in check mode; the operator's own rules stay as they are, also one that is like ours."""
    theirs = ["ufw allow 22/tcp comment 'mine'", "ufw allow from 192.0.2.1 to any port 2379 proto tcp"]
    host.ufw = list(theirs)
    predicted = opened(host, A, B, check=True)
    assert host.ran == []
    done = opened(host, A, B)
    assert (predicted.diff, done.changed) == (done.diff, True)
    ours = [
        "ufw allow in on isthmus0 comment 'isthmus.mesh'",
        "ufw allow from 192.0.2.2 to any port 8472 proto udp comment 'isthmus.mesh'",
    ]
    assert host.ufw == theirs + ours
    assert not opened(host, A, B).changed
    assert opened(host).changed
    assert host.ufw == [*theirs, ours[0]]
    assert (closed(host, check=True), len(host.ufw)) == (["ufw"], 3)
    assert (closed(host), host.ufw, closed(host)) == (["ufw"], theirs, [])


def test_native_packets_are_let_in_from_the_ranges_of_their_hosts(host: Host) -> None:
    native = ("10.101.0.0/28", ("10.102.0.0/27",))
    assert opened(host, native=native).changed
    assert "ufw allow from 10.102.0.0/27 to 10.101.0.0/28 comment 'isthmus.mesh'" in host.ufw
    assert not opened(host, native=native).changed
    host.firewalld = {"permanent": {}, "runtime": {}}
    opened(host, native=native)
    rule = 'rule family="ipv4" source address="10.102.0.0/27" destination address="10.101.0.0/28" accept'
    for zones in host.firewalld.values():
        assert zones["public"] == [rule]


def test_what_comes_out_of_wireguard_is_let_in_while_there_is_one(host: Host) -> None:
    assert opened(host, tunnels=("isthmus-wg0",)).changed
    rule = "ufw allow in on isthmus-wg0 to any port 8472 proto udp comment 'isthmus.mesh'"
    assert rule in host.ufw
    assert not opened(host, tunnels=("isthmus-wg0",)).changed
    opened(host)
    assert rule not in host.ufw
    host.firewalld = {"permanent": {}, "runtime": {}}
    opened(host, tunnels=("isthmus-wg0",))
    for zones in host.firewalld.values():
        assert zones["trusted"] == ["isthmus0", "isthmus-wg0"]
    assert not opened(host, tunnels=("isthmus-wg0",)).changed
    opened(host)
    assert host.firewalld["runtime"]["trusted"] == ["isthmus0"]


def test_a_ufw_that_is_switched_off_is_left_alone(host: Host) -> None:
    Path(firewall.UFW_CONF).write_text("ENABLED=no\n")
    assert not opened(host, A).changed
    assert host.ran == []


def test_a_command_that_fails_is_told(host: Host) -> None:
    host.broken = "allow"
    with pytest.raises(AssertionError, match="failed: ERROR: problem"):
        opened(host, A)


RICH_A = 'rule family="ipv4" source address="192.0.2.1" port port="2379" protocol="tcp" accept'
RICH_B = 'rule family="ipv4" source address="192.0.2.2" port port="8472" protocol="udp" accept'


def test_firewalld_is_opened_now_and_for_good_in_few_calls_and_closed_again(host: Host) -> None:
    Path(firewall.UFW_CONF).unlink()
    host.firewalld = {mode: {"public": [RICH_A], "trusted": []} for mode in ("runtime", "permanent")}
    before = json.loads(json.dumps(host.firewalld))
    predicted = opened(host, A, B, check=True)
    assert (host.ran, host.firewalld) == ([], before)
    assert not Path(firewall.STATE).exists()
    done = opened(host, A, B)
    assert done.diff == predicted.diff
    assert host.firewalld["runtime"] == host.firewalld["permanent"]
    assert host.firewalld["permanent"] == {"public": [RICH_A, RICH_B], "trusted": ["isthmus0"]}
    assert host.ran == ["runtime 1", "runtime 1", "permanent 1", "permanent 1"]
    assert not opened(host, A, B).changed
    # What somebody took out of one of the two comes back; the interface's zone may be another one day.
    host.firewalld["runtime"]["public"].remove(RICH_B)
    assert opened(host, A, B).changed
    host.zone = "internal"
    assert opened(host, A, B).changed
    assert host.firewalld["permanent"] == {"public": [RICH_A], "internal": [RICH_A, RICH_B], "trusted": ["isthmus0"]}
    assert closed(host, check=True) == ["firewalld"]
    assert closed(host) == ["firewalld"]
    assert {
        mode: {zone: found for zone, found in zones.items() if found} for mode, zones in host.firewalld.items()
    } == {mode: {"public": [RICH_A]} for mode in ("runtime", "permanent")}
    assert not Path(firewall.STATE).exists()


def test_rules_of_a_firewalld_that_does_not_run_are_not_forgotten(host: Host) -> None:
    """They are in its permanent configuration; without the program they are nothing."""
    Path(firewall.UFW_CONF).unlink()
    zones: dict[str, Zones] = {"runtime": {}, "permanent": {}}
    host.firewalld = zones
    opened(host, A)
    host.firewalld = None
    for check in (True, False):
        with pytest.raises(AssertionError, match=r"firewalld does not run .*Next: `systemctl start firewalld`"):
            closed(host, check)
    host.firewalld = zones
    assert closed(host) == ["firewalld"]
    assert [zone for found in zones.values() for zone in found.values() if zone] == []

    opened(host, A)
    host.programs.remove("firewall-cmd")
    assert closed(host) == ["firewalld"]
    assert not Path(firewall.STATE).exists()


def entry(site: str, underlay: str, advertise: str = "") -> dict[str, Any]:
    return {"site": site, "underlay4": underlay, "advertise4": advertise or underlay}


RECORD: dict[str, Any] = {
    "roster": {},
    "clusters/a": {
        "state": "present",
        "hosts": {
            "a1": entry("x", "10.0.0.1"),
            "a2": entry("x", "10.0.0.2", "192.0.2.2"),
            "a3": entry("x", "10.0.0.3"),
        },
        "etcd": {"client_port": 2379, "peer_port": 2380, "members": ["a1", "a2"]},
    },
    "clusters/b": {
        "state": "present",
        "hosts": {"b1": entry("y", "10.0.9.1", "192.0.2.9"), "b2": entry("y", "10.0.9.2")},
        "etcd": {"client_port": 2379, "peer_port": 2380, "members": ["b1"]},
    },
    "clusters/gone": {"state": "absent"},
}


def test_rules_follow_the_table_of_ports() -> None:
    spec = {"host": "a1", "cluster": {"name": "a"}, "overlay": {"port": 8472}, "member": {}}
    overlay = [("udp", 8472, source) for source in ("10.0.0.2", "10.0.0.3", "10.0.9.1", "10.0.9.2", "192.0.2.9")]
    assert rules(spec, RECORD) == overlay
    # An etcd host is read by its cluster and by the etcd hosts of others, and spoken raft with by its members.
    clients = [("tcp", 2379, source) for source in ("10.0.0.2", "10.0.0.3", "10.0.9.1", "192.0.2.9")]
    assert rules({**spec, "member": {"name": "a1"}}, RECORD) == [*clients, ("tcp", 2380, "10.0.0.2"), *overlay]


def test_wireguards_port_is_open_for_the_sites_that_encrypt() -> None:
    section = {"key": "k", "port": 51871, "plain_sites": ["x"], "sites": {}, "changing": {"y": "sends"}}
    spec = {"host": "a1", "cluster": {"name": "a"}, "overlay": {"port": 8472}, "member": None, "wireguard": section}
    wanted = [one for one in rules(spec, RECORD) if one[1] == 51871]
    assert wanted == [("udp", 51871, source) for source in ("10.0.9.1", "10.0.9.2", "192.0.2.9")]


def test_what_the_run_will_open_is_not_blocked() -> None:
    blocked = {"host": "b1", "address": "192.0.2.9", "protocol": "udp", "port": 8472, "how": "refused", "source": "s"}
    wall = {"name": "ufw", "commands": {"udp/8472": "ufw allow 8472/udp"}, "words": "ufw is active.", "managed": True}
    asker = {"inventory_hostname": "a1", "__preflight_reached": {"blocked": [blocked]}}
    target = {"inventory_hostname": "b1", "__preflight_result": {"firewalls": [wall]}}
    assert blocked_ports.blocked_ports([asker, target]) == []
    wall["managed"] = False
    told = "UDP 8472 of b1 (192.0.2.9) does not answer from a1 (s): refused. On b1: ufw is active."
    assert blocked_ports.blocked_ports([asker, target]) == [told]
    [words] = blocked_ports.blocked_ports([asker])
    assert "b1 is not in this run, so its firewalls were not looked at" in words


@pytest.mark.parametrize(
    ("port", "settings"), [(8472, "isthmus_advertise"), (4500, "ipsec.gateways[].address")], ids=["overlay", "gateway"]
)
def test_where_the_address_of_a_port_comes_from_is_told(port: int, settings: str) -> None:
    target = {"inventory_hostname": "b1", "__preflight_result": {"firewalls": []}}

    def told(how: str) -> str:
        blocked = {"host": "b1", "address": "192.0.2.9", "protocol": "udp", "port": port, "how": how, "source": "s"}
        asker = {"inventory_hostname": "a1", "__preflight_reached": {"blocked": [blocked]}}
        (words,) = blocked_ports.blocked_ports([asker, target])
        return words

    assert f"whether the address is b1's (isthmus_underlay, {settings})" in told("no answer to 3 datagrams")
    assert f"Next: correct isthmus_underlay or {settings} of b1, or" in told("c1 answers there: the address leads")


def test_what_is_open_to_all_is_written_as_the_firewalls_show_it(host: Host) -> None:
    """Else the next run would not know it again."""
    everybody = ("udp", 51871, "0.0.0.0/0")
    host.firewalld = {"runtime": {}, "permanent": {}}
    assert opened(host, everybody).changed
    assert "ufw allow 51871/udp comment 'isthmus.mesh'" in host.ufw
    assert 'rule family="ipv4" port port="51871" protocol="udp" accept' in host.firewalld["permanent"]["public"]
    assert not opened(host, everybody).changed
    assert opened(host).changed
    assert not [line for line in host.ufw if "51871" in line]
