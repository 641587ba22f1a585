# SPDX-License-Identifier: GPL-3.0-or-later
"""How a host's own resolution is read, joined and found again."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import resolver


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's /etc and the collection's state directory, both empty."""
    (tmp_path / "state").mkdir()
    monkeypatch.setattr(resolver, "RESOLV_CONF", str(tmp_path / "resolv.conf"))
    monkeypatch.setattr(resolver, "NAMES", str(tmp_path / "hosts"))
    monkeypatch.setattr(resolver, "NSSWITCH", str(tmp_path / "nsswitch.conf"))
    monkeypatch.setattr(resolver, "ORIGINAL", str(tmp_path / "state" / "original"))
    monkeypatch.setattr(resolver, "ORIGINAL_LINK", str(tmp_path / "state" / "original-link"))
    return tmp_path


def test_a_plain_file_is_joined_with_its_servers_behind_ours(host: Path) -> None:
    original = "search example.org\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n"
    (host / "resolv.conf").write_text(original)
    found = resolver.probe(resolved_active=True)
    assert (found.method, found.link, found.joined) == ("file", None, False)
    joined = resolver.joined_file(found.original)
    assert resolver.servers(joined) == [resolver.LOCAL_SERVER, "192.0.2.1", "192.0.2.2"]
    assert joined.endswith(original)
    assert resolver.upstream(found) == resolver.ORIGINAL


def test_what_was_joined_is_seen_through(host: Path) -> None:
    (host / "state" / "original").write_text("nameserver 192.0.2.1\n")
    (host / "resolv.conf").write_text(resolver.joined_file("nameserver 192.0.2.1\n"))
    found = resolver.probe(resolved_active=False)
    assert (found.method, found.original, found.joined) == ("file", "nameserver 192.0.2.1\n", True)
    assert resolver.joined_file(found.original) == (host / "resolv.conf").read_text()


def test_the_program_behind_a_link_stays_in_charge(host: Path) -> None:
    (host / "kept.conf").write_text("nameserver 192.0.2.9\n")
    (host / "resolv.conf").symlink_to("kept.conf")
    found = resolver.probe(resolved_active=False)
    assert (found.method, found.link) == ("file", "kept.conf")
    assert resolver.upstream(found) == str(host / "kept.conf")
    # After joining, a change that the program makes is what counts.
    (host / "resolv.conf").unlink()
    (host / "resolv.conf").write_text(resolver.joined_file(found.original))
    (host / "state" / "original-link").write_text("kept.conf")
    (host / "kept.conf").write_text("nameserver 192.0.2.10\n")
    assert resolver.probe(resolved_active=False).original == "nameserver 192.0.2.10\n"


@pytest.mark.parametrize(("rcode", "answers"), [(0, True), (3, True), (2, False), (5, False)], ids=str)
def test_the_first_server_is_asked_for_the_root(host: Path, rcode: int, answers: bool) -> None:
    (host / "resolv.conf").write_text("nameserver 127.0.0.1\nnameserver 192.0.2.1\n")
    asked: list[bytes] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def answer() -> None:
            question, client = server.recvfrom(512)
            asked.append(question)
            server.sendto(question[:2] + bytes([0x81, 0x80 | rcode]) + question[4:], client)

        serving = threading.Thread(target=answer)
        serving.start()
        assert resolver.root_answers(server.getsockname()[1]) is answers
        serving.join()
    assert asked[0][2:] == bytes([1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1])


def test_no_server_is_no_answer(host: Path) -> None:
    assert resolver.root_answers() is False


@pytest.mark.parametrize(
    ("names", "found", "words"),
    [
        ("", [], ""),
        ("10.111.0.5 web.shop.svc.other.local\n", [], ""),
        ("10.111.0.5 web.shop.svc.clusterset.local\n", ["10.111.0.5"], ""),
        ("10.111.0.5 web.shop.svc.clusterset.local\n", ["127.0.0.1"], "is 127.0.0.1; in the mesh it is 10.111.0.5"),
        ("10.111.0.5 web.shop.svc.clusterset.local\n", None, "does not know web.shop.svc.clusterset.local"),
    ],
    ids=["no name", "another domain's", "right", "wrong", "unknown"],
)
def test_a_name_of_the_mesh_leads_to_its_address(
    host: Path, monkeypatch: pytest.MonkeyPatch, names: str, found: list[str] | None, words: str
) -> None:
    def ask(_name: str, *_more: object) -> list[tuple[object, ...]]:
        if found is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in found]

    (host / "hosts").write_text(names)
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    problem = resolver.problem("clusterset.local", root_answered=False)
    assert (words in problem) is True
    assert bool(problem) is bool(words)


def test_other_names_must_go_on_as_before(host: Path) -> None:
    assert "answers no more" in resolver.problem("clusterset.local", root_answered=True)
    assert resolver.problem("clusterset.local", root_answered=False) == ""


def test_a_stub_of_resolved_means_resolved_only_while_it_runs(host: Path) -> None:
    (host / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    assert resolver.probe(resolved_active=True).method == "resolved"
    assert resolver.probe(resolved_active=False).method == "file"
    assert resolver.upstream(resolver.probe(resolved_active=True)) is None


def test_a_host_without_the_file_is_joined_too(host: Path) -> None:
    found = resolver.probe(resolved_active=False)
    assert found.original is None
    assert resolver.servers(resolver.joined_file(None)) == [resolver.LOCAL_SERVER]


@pytest.mark.parametrize(
    ("content", "address", "line"),
    [
        ("nameserver 127.0.0.53\n", "10.0.0.1", "no-resolv"),
        ("nameserver 192.0.2.1\n", resolver.LOCAL_SERVER, "resolv-file="),
    ],
    ids=["resolved", "file"],
)
def test_dnsmasq_answers_for_one_domain_and_forwards_for_the_host_only(
    host: Path, content: str, address: str, line: str
) -> None:
    (host / "resolv.conf").write_text(content)
    found = resolver.probe(resolved_active=True)
    lines = resolver.dnsmasq_conf("10.0.0.1", "clusterset.local", resolver.upstream(found)).splitlines()
    assert {"no-hosts", "local=/clusterset.local/", "cache-size=0"} <= set(lines)
    assert [one for one in lines if one.startswith("listen-address=")] == [f"listen-address={address}"]
    assert [one for one in lines if one.startswith(line)]
    assert resolver.server(found, "10.0.0.1") == address


@pytest.fixture
def resolved(host: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """systemd-resolved's files of the host, with one server of the network's."""
    place = host / "resolve"
    place.mkdir()
    monkeypatch.setattr(resolver, "_STUB_FILES", (str(place / "stub-resolv.conf"),))
    monkeypatch.setattr(resolver, "_UPLINKS", str(place / "resolv.conf"))
    (place / "stub-resolv.conf").write_text("nameserver 127.0.0.53\n")
    (place / "resolv.conf").write_text("# by resolved\n\nnameserver 192.0.2.1\nsearch example.org\n")
    return place


def test_only_the_stub_of_resolved_means_resolved(host: Path, resolved: Path) -> None:
    (host / "resolv.conf").symlink_to("resolve/stub-resolv.conf")
    assert resolver.probe(resolved_active=True).method == "resolved"
    (host / "resolv.conf").unlink()
    (host / "resolv.conf").symlink_to("resolve/resolv.conf")
    found = resolver.probe(resolved_active=True)
    assert (found.method, found.link) == ("file", "resolve/resolv.conf")
    assert resolver.upstream(found) == str(resolved / "resolv.conf")


@pytest.mark.parametrize(
    ("line", "method"),
    [
        ("hosts: files resolve [!UNAVAIL=return] dns", "resolved"),
        ("hosts:\tfiles myhostname resolve", "resolved"),
        ("hosts: files dns # resolve", "file"),
        ("networks: resolve", "file"),
    ],
)
def test_programs_that_ask_resolved_past_resolv_conf_are_seen(
    host: Path, resolved: Path, line: str, method: str
) -> None:
    (host / "nsswitch.conf").write_text(f"passwd: files\n{line}\n")
    (host / "resolv.conf").symlink_to("resolve/resolv.conf")
    assert resolver.probe(resolved_active=True).method == method
    assert resolver.probe(resolved_active=False).method == "file"


def test_what_resolved_reads_back_from_our_file_changes_nothing(host: Path, resolved: Path) -> None:
    """resolved copies the servers of a resolv.conf that is not its own into its file of uplinks."""
    (host / "resolv.conf").symlink_to("resolve/resolv.conf")
    found = resolver.probe(resolved_active=True)
    joined = resolver.joined_file(found.original)
    assert resolver.servers(joined) == [resolver.LOCAL_SERVER, "127.0.0.53"]
    assert "search example.org\n" in joined
    (host / "state" / "original-link").write_text(found.link or "")
    (host / "resolv.conf").unlink()
    (host / "resolv.conf").write_text(joined)
    (resolved / "resolv.conf").write_text(
        f"# by resolved\nnameserver {resolver.LOCAL_SERVER}\nnameserver 192.0.2.9\nsearch example.org\n"
    )
    again = resolver.probe(resolved_active=True)
    assert (again.method, again.link, again.joined) == ("file", "resolve/resolv.conf", True)
    assert resolver.joined_file(again.original) == joined


def test_what_the_operator_edits_behind_our_lines_counts(host: Path) -> None:
    (host / "state" / "original").write_text("nameserver 192.0.2.1\n")
    edited = "nameserver 192.0.2.7\noptions edns0\n"
    (host / "resolv.conf").write_text(resolver.joined_file(edited))
    assert resolver.probe(resolved_active=False).original == edited
    (host / "resolv.conf").write_text("search example.org\n" + resolver.joined_file(edited))
    assert resolver.probe(resolved_active=False).original == "search example.org\n" + edited


def test_a_lost_copy_of_the_original_loses_no_name_server(host: Path) -> None:
    (host / "resolv.conf").write_text(resolver.joined_file("nameserver 192.0.2.1\n"))
    assert resolver.probe(resolved_active=False).original == "nameserver 192.0.2.1\n"
    # Nor does a file of which only our lines are left.
    (host / "state" / "original").write_text("nameserver 192.0.2.2\n")
    (host / "resolv.conf").write_text(resolver.joined_file(None))
    assert resolver.probe(resolved_active=False).original == "nameserver 192.0.2.2\n"


@pytest.mark.parametrize(
    "original",
    [
        "nameserver 192.0.2.1\noptions rotate\n",
        "options  edns0 rotate\ttimeout:1\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n",
        "nameserver 192.0.2.1\noptions edns0\noptions timeout:1 rotate",
        "nameserver 192.0.2.1\n# options rotate\nsearch rotate example.org\n",
    ],
    ids=["alone", "among others", "no end of line", "no option"],
)
def test_the_first_server_is_asked_first_and_the_options_come_back(host: Path, original: str) -> None:
    joined = resolver.joined_file(original)
    options = [word for line in joined.splitlines() if line.startswith("options") for word in line.split()[1:]]
    before = [word for line in original.splitlines() if line.startswith("options") for word in line.split()[1:]]
    assert options == [word for word in before if word != "rotate"]
    assert resolver.servers(joined)[0] == resolver.LOCAL_SERVER
    (host / "resolv.conf").write_text(joined)
    found = resolver.probe(resolved_active=False)
    assert found.original == original
    assert resolver.joined_file(found.original) == joined


def test_options_that_the_operator_edits_behind_our_lines_count(host: Path) -> None:
    joined = resolver.joined_file("options rotate timeout:1\nnameserver 192.0.2.1\n")
    (host / "resolv.conf").write_text(joined.replace("\noptions timeout:1\n", "\noptions timeout:3\n"))
    original = "options timeout:3\noptions rotate\nnameserver 192.0.2.1\n"
    assert resolver.probe(resolved_active=False).original == original
    (host / "resolv.conf").write_text(resolver.joined_file(original))
    assert resolver.probe(resolved_active=False).original == original
    # One that is new there is left out by the next run.
    (host / "resolv.conf").write_text(resolver.joined_file("nameserver 192.0.2.1\n") + "options rotate\n")
    assert "\noptions rotate" not in resolver.joined_file(resolver.probe(resolved_active=False).original)


# In namespaces of its own: the host's programs ask by a resolv.conf with two servers, of which the network's knows no
# name of the mesh.
_LOOK_UP = """
import pathlib, subprocess, sys, time
from ansible_collections.isthmus.mesh.plugins.module_utils import packets, resolver

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["ip", "address", "add", "192.0.2.9/32", "dev", "lo"], check=True)  # or nobody asks for an IPv4 address
place, name = pathlib.Path(sys.argv[1]), "web.shop.svc.clusterset.local"
(place / "resolv.conf").write_text(resolver.joined_file("options rotate timeout:20\\nnameserver 127.0.0.99\\n"))
(place / "nsswitch.conf").write_text("hosts: dns\\n")
for file in ("resolv.conf", "nsswitch.conf"):
    subprocess.run(["mount", "--bind", place / file, f"/etc/{file}"], check=True)
command = ["dnsmasq", "--keep-in-foreground", "--user=root", "--conf-file=/dev/null", "--no-hosts", "--no-resolv"]
command += ["--bind-interfaces", "--pid-file=", "--local=/local/"]
ours = [f"--listen-address={resolver.LOCAL_SERVER}", f"--host-record={name},10.111.0.1"]
running = [subprocess.Popen(command + more) for more in (ours, ["--listen-address=127.0.0.99"])]
try:
    for server in (resolver.LOCAL_SERVER, "127.0.0.99"):
        for attempt in range(100):
            try:
                packets.query(server, name, "A", 1)
                break
            except packets.NoAnswer:
                time.sleep(0.1)
    for lookup in range(30):
        print(*subprocess.run(["getent", "ahostsv4", name], capture_output=True, text=True).stdout.split()[:1])
finally:
    for one in running:
        one.terminate()
        one.wait()
"""


@pytest.mark.root
def test_every_question_of_a_host_that_rotates_servers_comes_to_ours(tmp_path: Path) -> None:
    search = [path for path in sys.path if (Path(path) / "ansible_collections").is_dir()]
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, "-c", _LOOK_UP, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": ":".join(search), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    assert done.stdout.splitlines() == ["10.111.0.1"] * 30, done.stderr


# In a network namespace of its own: the configuration under test, and the network's server that it forwards to.
_ASK = """
import pathlib, subprocess, sys, time
from ansible_collections.isthmus.mesh.plugins.module_utils import packets, resolver

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
place = pathlib.Path(sys.argv[1])
(place / "hosts").write_text("10.111.0.1 web.shop.svc.clusterset.local\\n")
(place / "servers").write_text(f"nameserver {resolver.LOCAL_SERVER}\\nnameserver 127.0.0.99\\n")
ours = resolver.dnsmasq_conf("10.0.0.1", "clusterset.local", str(place / "servers"))
(place / "ours").write_text(ours.replace("/run/isthmus/dns/hosts", str(place / "hosts")))
network = ("listen-address=127.0.0.99", "bind-interfaces", "no-hosts", "no-resolv", "address=/example.org/192.0.2.77")
(place / "network").write_text("\\n".join([*network, "pid-file=", ""]))
command = ["dnsmasq", "--keep-in-foreground", "--user=root", "--conf-file="]
running = [subprocess.Popen([*command[:-1], command[-1] + str(place / name)]) for name in ("network", "ours")]
try:
    for server, name in (("127.0.0.99", "example.org"), (resolver.LOCAL_SERVER, "web.shop.svc.clusterset.local")):
        for attempt in range(100):
            try:
                print(name, *packets.query(server, name, "A", 1))
                break
            except packets.NoAnswer:
                time.sleep(0.1)
    print("example.org", *packets.query(resolver.LOCAL_SERVER, "example.org", "A", 1))
finally:
    for one in running:
        one.terminate()
        one.wait()
"""


@pytest.mark.root
def test_dnsmasq_answers_and_does_not_ask_itself(tmp_path: Path) -> None:
    """Its file of servers names it too, as systemd-resolved's file of uplinks does once it is joined."""
    if shutil.which("dnsmasq") is None:
        pytest.fail("dnsmasq is missing; it is Debian's package dnsmasq-base (requirements/apt.txt)")
    search = [path for path in sys.path if (Path(path) / "ansible_collections").is_dir()]
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", _ASK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": ":".join(search), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    network, ours = "example.org 0 ['192.0.2.77']", "web.shop.svc.clusterset.local 0 ['10.111.0.1']"
    assert done.stdout.splitlines() == [network, ours, network], done.stderr


# --- what keeps our lines out, or may take them out again


def found_at(host: Path, content: str | None = None) -> tuple[list[str], list[str]]:
    if content is not None:
        (host / "resolv.conf").write_text(content)
    return resolver.obstacles(resolver.probe(resolved_active=False))


def test_a_plain_file_has_no_obstacle(host: Path) -> None:
    (host / "nsswitch.conf").write_text("hosts: files dns\n")
    assert found_at(host, "nameserver 192.0.2.1\n") == ([], [])


@pytest.mark.root
def test_an_immutable_file_is_told(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (host / "resolv.conf").write_text("nameserver 192.0.2.1\n")
    monkeypatch.setattr(resolver.fcntl, "ioctl", lambda _handle, _request, flags: flags.__setitem__(0, 0x10))
    ([words], doubts) = found_at(host)
    assert "is immutable" in words
    assert f"`chattr -i {host}/resolv.conf`" in words
    assert doubts == []


def test_the_flag_is_read_where_the_file_system_knows_it(host: Path) -> None:
    (host / "resolv.conf").write_text("")
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", host / "resolv.conf"], check=False).returncode:
        assert resolver._immutable(str(host / "resolv.conf")) is False
        return
    try:
        assert resolver._immutable(str(host / "resolv.conf")) is True
    finally:
        subprocess.run(["chattr", "-i", host / "resolv.conf"], check=True)
    assert resolver._immutable(str(host / "resolv.conf")) is False


def test_a_file_that_is_a_mount_is_told(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = host / "mountinfo"
    mounts.write_text(f"22 1 0:21 / / rw - ext4 /dev/a rw\n30 22 0:5 /x {host}/resolv.conf rw - ext4 /dev/a rw\n")
    monkeypatch.setattr(resolver, "_MOUNTS", str(mounts))
    ([words], _doubts) = found_at(host, "nameserver 192.0.2.1\n")
    assert "is a mount of its own" in words


@pytest.mark.parametrize(
    ("line", "name", "remedy"),
    [
        ("# Generated by NetworkManager", "NetworkManager", "`rc-manager=unmanaged` under [main]"),
        ("# Generated by resolvconf", "resolvconf", "the link to resolvconf's own file"),
        ("# Generated by dhcpcd from eth0.dhcp", "dhcpcd", "nohook resolv.conf"),
        ("# resolv.conf(5) file generated by tailscale", "Tailscale", "--accept-dns=false"),
        ("# Generated by Connection Manager", "ConnMan", "systemd-resolved"),
        ("# This file was automatically generated by WSL.", "WSL", "generateResolvConf = false"),
        ("; Created by cloud-init on instance boot automatically", "cloud-init", "manage_resolv_conf: false"),
    ],
)
def test_another_program_that_writes_the_file_is_named(host: Path, line: str, name: str, remedy: str) -> None:
    (problems, [words]) = found_at(host, f"{line}\nnameserver 192.0.2.1\n")
    assert problems == []
    assert f"is a file that {name} writes" in words
    assert remedy in words


def test_a_dhclient_that_runs_is_named(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_runs", lambda command: command == "dhclient")
    (_problems, [words]) = found_at(host, "nameserver 192.0.2.1\n")
    assert "is a file that dhclient writes" in words


def test_an_unknown_link_and_a_broken_one_are_named(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (host / "resolv.conf").symlink_to("kept.conf")
    (problems, [words]) = found_at(host)
    assert problems == []
    assert f"is a link to {host}/kept.conf, which is not there" in words
    (host / "kept.conf").write_text("nameserver 192.0.2.1\n")
    (problems, [words]) = found_at(host)
    assert problems == []
    assert f"is a link to {host}/kept.conf, kept by a program that isthmus.mesh does not know" in words
    monkeypatch.setattr(resolver, "_KEEPERS", (str(host),))
    assert found_at(host) == ([], [])


@pytest.mark.parametrize(
    ("main", "left"),
    [
        (None, False),
        ("plugins=keyfile\nrc-manager=symlink\n", False),
        ("rc-manager=unmanaged\n", True),
        ("dns=none\n", True),
        ("rc-manager\n", False),
    ],
    ids=["as it comes", "symlink", "unmanaged", "no DNS", "not understood"],
)
def test_networkmanager_replaces_our_file_unless_it_is_told_to_leave_it(
    host: Path, monkeypatch: pytest.MonkeyPatch, main: str | None, left: bool
) -> None:
    monkeypatch.setattr(resolver, "_NETWORK_MANAGER", f"{host}/NetworkManager/")
    (host / "conf.d").mkdir()
    monkeypatch.setattr(resolver, "_NETWORK_MANAGER_CONF", (f"{host}/main.conf", f"{host}/conf.d/*.conf"))
    (host / "main.conf").write_text("[main]\nrc-manager=auto\n\n[device]\nwifi.scan-rand-mac-address=no\n")
    if main is not None:
        (host / "conf.d" / "90-dns.conf").write_text(f"[main]\n{main}")
    (host / "NetworkManager").mkdir()
    (host / "NetworkManager" / "resolv.conf").write_text("# Generated by NetworkManager\nnameserver 192.0.2.1\n")
    (host / "resolv.conf").symlink_to("NetworkManager/resolv.conf")
    (problems, doubts) = found_at(host)
    assert problems == []
    told = ["is a link to" in words and "Next: set `rc-manager=unmanaged`" in words for words in doubts]
    assert told == ([] if left else [True])


def test_a_local_name_server_is_forwarded_to_when_it_is_there(host: Path) -> None:
    (_problems, [words]) = found_at(host, "nameserver 127.0.7.7\n")
    assert "names 127.0.7.7 as name server, and nobody listens there on UDP port 53" in words


def test_a_host_that_has_no_name_server_is_told(host: Path) -> None:
    (problems, [words]) = found_at(host, "search example.org\n")
    assert problems == []
    assert "names no name server" in words


@pytest.mark.parametrize(
    "content",
    ["nameserver 192.0.2.1\n", "nameserver 127.0.0.53\n", resolver.joined_file("nameserver 192.0.2.1\n")],
    ids=["a file", "resolved", "joined"],
)
def test_a_host_whose_programs_ask_no_name_server_is_refused(host: Path, content: str) -> None:
    (host / "nsswitch.conf").write_text("passwd: files\nhosts: files mymachines # dns\n")
    (host / "resolv.conf").write_text(content)
    ([words], doubts) = resolver.obstacles(resolver.probe(resolved_active=True))
    assert "has `hosts: files mymachines`, without dns" in words
    assert doubts == []
    (host / "nsswitch.conf").write_text("hosts: files dns\n")
    assert resolver.obstacles(resolver.probe(resolved_active=True)) == ([], [])


def test_nothing_is_said_of_a_host_that_is_joined_or_asks_resolved(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_immutable", lambda _path: True)
    assert found_at(host, resolver.joined_file("# Generated by dhcpcd\n")) == ([], [])
    (host / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    assert resolver.obstacles(resolver.probe(resolved_active=True)) == ([], [])
