# SPDX-License-Identifier: GPL-3.0-or-later
"""Agents and registrars of versions N and N-1 work side by side, and `site` makes one version of them.

An etcd host of onprem and edge-1, agent and registrar each, get what the previous version's `site` would have put there
(tests/previous_release.py): its bundle, its units, and nothing that this version's programs have left.
"""

from __future__ import annotations

import json
import runpy
import subprocess
from collections.abc import Iterator

import previous_release
import pytest
from demo import EDGE
from estate_tools import ETCD_HOSTS, ONPREM, Estate
from playbook import COLLECTIONS, play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

OLD = ("onprem-2", EDGE)
ROSTER = "isthmus/v1/estate/roster"
PROGRAMS = ("isthmusd.service", "isthmus-registrar.service")

INSTALL = """set -e
rm -rf {home} /root/previous
mkdir /root/previous
tar -xzf /root/previous.tar.gz -C /root/previous
/usr/bin/python3 -m venv {home}
{home}/bin/python -m pip --disable-pip-version-check install --quiet --no-index --no-cache-dir \
  --no-warn-script-location --find-links /root/previous/wheels --require-hashes \
  --requirement /root/previous/requirements.txt
mkdir -p {home}/lib
cp /root/previous/lib/libbpf.so.1 {home}/lib/
cp /root/previous/bundle.json {home}/
rm -rf /root/previous /root/previous.tar.gz
"""
# An older version never comes after a newer one, so whatever that has left goes: environment, maps of another layout,
# last-known-good, the registrar's file, generations.
REPLACE = """set -e
systemctl stop isthmus-dns-reload.path {programs}
isthmus datapath remove --yes
rm -rf /var/lib/isthmus/agent/last-known-good.json /var/lib/isthmus/registrar /var/lib/isthmus/generations
ln -sfn {home} /opt/isthmus/current
find /opt/isthmus -mindepth 1 -maxdepth 1 -type d -name '[0-9]*' ! -path {home} -exec rm -rf {{}} +
systemctl daemon-reload
systemctl start isthmus-dns-reload.path {programs}
if [ -e /etc/systemd/system/isthmus-resolved.service ]; then systemctl restart isthmus-resolved.service; fi
"""


def present() -> str:
    """The version of the installed artifact."""
    manifest = COLLECTIONS / "ansible_collections" / "isthmus" / "mesh" / "MANIFEST.json"
    return str(json.loads(manifest.read_text())["collection_info"]["version"])


def versions(estate: Estate) -> dict[str, str]:
    """What the agent of each host says it is."""
    return {host: estate.ask(host, "status")["version"] for host in estate.lab.hosts}


def expected(old: tuple[str, ...], estate: Estate) -> dict[str, str]:
    return {host: previous_release.VERSION if host in old else present() for host in estate.lab.hosts}


def install_previous(estate: Estate, host: str) -> None:
    archive = previous_release.bundle()
    about = json.loads((archive.parent / "bundle.json").read_text())
    home = f"/opt/isthmus/{about['version']}-{about['platforms'][0]['digest'][:8]}"
    with archive.open("rb") as file:
        subprocess.run([*estate.lab.ssh(host), "cat > /root/previous.tar.gz"], stdin=file, check=True, timeout=60)
    estate.lab.exec(host, ["sh", "-c", INSTALL.format(home=home)])
    units = runpy.run_path(str(previous_release.sources() / "plugins" / "module_utils" / "units.py"))
    texts = {
        "isthmusd.service": units["agent_unit"]("previous"),
        "isthmus-registrar.service": units["registrar_unit"]("previous"),
        "isthmus-dns-reload.path": units["dns_reload_path_unit"](),
        "isthmus-dns-reload.service": units["dns_reload_unit"](),
    }
    for name, text in texts.items():
        estate.lab.exec(host, ["tee", f"/etc/systemd/system/{name}"], feed=text)
    estate.lab.exec(host, ["sh", "-c", REPLACE.format(home=home, programs=" ".join(PROGRAMS))])


def record_says(estate: Estate, version: str) -> None:
    """The record names the version that `site` applied last, as if that one had never been replaced."""
    for hosts in ETCD_HOSTS.values():
        roster = json.loads(estate.keys(hosts[0], ROSTER)[ROSTER].value)
        roster |= {"version": version, "revision": roster["revision"] + 1}
        estate.etcdctl(hosts[0], "put", ROSTER, json.dumps(roster))


@pytest.fixture(scope="module")
def mixed(estate: Estate) -> Iterator[Estate]:
    """The estate with the previous version on two hosts; of one version again at the end."""
    previous_release.bundle()
    estate.converged()
    try:
        for host in OLD:
            install_previous(estate, host)
        record_says(estate, previous_release.VERSION)
        estate.until("two hosts have the previous version", lambda: versions(estate) == expected(OLD, estate))
        estate.converged()
        yield estate
    finally:
        play("site", "-e", f"isthmus_version={present()}")
        estate.converged()


def test_services_are_answered_and_changes_reach_both_versions(mixed: Estate) -> None:
    with mixed.unnoticed(mixed.edge, mixed.onprem), mixed.service_of_operators("both"):
        mixed.until("shop/both is known everywhere", lambda: mixed.known_everywhere("both"))
    # A withdrawal by the old agent is seen by new ones, and one by a new agent by the old.
    for host in ("onprem-2", "cloud-1"):
        with mixed.undone(lambda host=host: mixed.lab.exec(host, ["systemctl", "start", "web.service"])):  # type: ignore[misc]
            mixed.lab.exec(host, ["systemctl", "stop", "web.service"])
            mixed.everywhere(mixed.backends - {host}, tuple(mixed.lab.hosts))
        mixed.everywhere(mixed.backends, tuple(mixed.lab.hosts))


@pytest.mark.parametrize("leaders", [("onprem-2",), ("onprem-1", "onprem-3")], ids=["previous", "present"])
def test_the_other_version_leads_and_nothing_is_withdrawn(mixed: Estate, leaders: tuple[str, ...]) -> None:
    """From a registrar of the present version to one of the previous, and the other way. Peers of both versions look
    on."""
    others = [host for host in ONPREM if host not in leaders]

    def start() -> None:
        for host in ONPREM:
            mixed.lab.exec(host, ["systemctl", "start", "isthmus-registrar.service"])

    # Whoever leads now, the ones that shall be followed lead first.
    with mixed.undone(start):
        for host in leaders:
            mixed.kill_for_good(host, "isthmus-registrar")
        mixed.until("the other version leads", lambda: mixed.registrar_leader("onprem-1")[0] in others)
    mixed.converged()
    before = {host: mixed.state(host) for host in ("onprem-1", "cloud-1", EDGE)}
    with mixed.unnoticed(mixed.edge, mixed.onprem), mixed.undone(start):
        for host in others:
            mixed.kill_for_good(host, "isthmus-registrar")
        mixed.until("it is followed", lambda: mixed.registrar_leader("onprem-1")[0] in leaders)
        with mixed.service_of_operators("later"):
            mixed.until("shop/later is known everywhere", lambda: mixed.known_everywhere("later"))
    mixed.converged()
    assert mixed.withdrawn(before) == {}
    now = {host: mixed.state(host) for host in before}
    for host, keys in before.items():
        services = {name: key.value for name, key in keys.items() if "/services/v1/" in name}
        assert {name: value for name, value in services.items() if now[host][name].value != value} == {}


def test_site_makes_one_version_of_them(mixed: Estate) -> None:
    """Not by chance: only when it is asked for. One host first, while the other is still of the previous version."""
    unasked = play("site", check=False)
    assert unasked.status != 0
    assert f"isthmus_version={present()}" in unasked.output
    assert versions(mixed) == expected(OLD, mixed)

    upgrade = ("-e", f"isthmus_version={present()}")
    with mixed.unnoticed(mixed.edge, mixed.onprem):
        play("site", "--limit", EDGE, *upgrade)
        mixed.until(f"{EDGE} is upgraded", lambda: versions(mixed) == expected(("onprem-2",), mixed))
        assert "onprem-2" in play("site", *upgrade).changed
    assert versions(mixed) == expected((), mixed)
    mixed.converged()
    for run in (play("site", *upgrade), play("site")):
        assert run.changed == {}
    with mixed.service_of_operators("after"):
        for host in OLD:  # the path unit that tells dnsmasq is the present one as well
            name = "after.shop.svc.clusterset.local"
            mixed.until(
                f"{host} knows {name}",
                lambda host=host, name=name: (  # type: ignore[misc]
                    mixed.lab.exec(host, ["getent", "ahostsv4", name], check=False).returncode == 0
                ),
            )
    play("verify")
