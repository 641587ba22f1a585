# SPDX-License-Identifier: GPL-3.0-or-later
"""A forgotten host that is back, under a real ansible-playbook: refused while it holds keys, planned when it holds
nothing. What the playbook `forget` refuses, and what a check of `replace_authority` says. Every host has an /etc of its
own, in a mount namespace; the record is read from the copies there."""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from isthmus_agent import pki, revocation
from isthmus_mesh.forgetting import Forget
from playbook import Recap, recaps
from unit.mesh.estates import estate, hosts, model, planned

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_systemctl.py")
HOSTS = ("c1", "o1", "o2", "o3")

pytestmark = [pytest.mark.root]

# One at a time: hosts ask their authority at once, and a second mount of the same overlay may be refused. /run is
# the host's own too, for the lock of a run.
PYTHON = """\
#!/bin/sh
exec flock -o {place}/entered unshare --mount sh -c 'mount --bind {place}/run /run &&
mount -t overlay -o lowerdir=/etc,upperdir={place}/etc,workdir={place}/work none /etc &&
exec env PYTHONPATH={agent} PYTHONDONTWRITEBYTECODE=1 {python} "$@"' sh "$@"
"""
PLAN = """\
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.import_role:
        name: isthmus.mesh.plan
    - ansible.builtin.debug:
        msg: "planned: {{ __plan_result.specs | list | sort | join(' ') }}"
      run_once: true
"""


class Site:
    """Hosts that hold copies of the record; in `site`'s they say that o3 is forgotten."""

    def __init__(self, place: Path) -> None:
        self.place = place
        mesh = place / "collections" / "ansible_collections" / "isthmus" / "mesh"
        (mesh / "playbooks").mkdir(parents=True)
        for path in (*ROOT.iterdir(), *ROOT.glob("playbooks/*")):
            if not (mesh / path.relative_to(ROOT)).exists():
                (mesh / path.relative_to(ROOT)).symlink_to(path)
        # What comes after in `forget` needs machines; tests/e2e has them.
        (mesh / "playbooks" / "site.yml").unlink()
        (mesh / "playbooks" / "site.yml").write_text("- hosts: localhost\n  gather_facts: false\n  tasks: []\n")
        (place / "bin").mkdir()
        (place / "bin" / "systemctl").write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        (place / "bin" / "systemctl").chmod(0o755)
        (place / "plan.yml").write_text(PLAN)
        self.etc = {name: place / "hosts" / name / "etc" / "isthmus" for name in HOSTS}
        for name in HOSTS:
            home = place / "hosts" / name
            (home / "etc" / "isthmus" / "pki").mkdir(parents=True)
            (home / "work").mkdir()
            (home / "run").mkdir()
            (home / "etc" / "isthmus" / "pki" / "agent.key").write_text("x")
            (home / "python").write_text(PYTHON.format(place=home, agent=ROOT / "agent", python=sys.executable))
            (home / "python").chmod(0o755)

    def know(self, record: Mapping[str, Any]) -> None:
        """Every host has this copy of the record."""
        for etc in self.etc.values():
            etc.mkdir(exist_ok=True)
            (etc / "estate.json").write_text(json.dumps(record))

    def run(self, playbook: str, *options: str, down: tuple[str, ...] = ()) -> tuple[int, dict[str, Recap], str]:
        """Exit status, recaps, and all that was said without line breaks."""
        inventory: dict[str, Any] = hosts()
        for name, variables in inventory.items():
            variables["isthmus_underlay"] = variables["ansible_host"]
            variables["ansible_connection"] = "local"
            variables["ansible_python_interpreter"] = str(self.place / "hosts" / name / "python")
            if name in down:
                variables.update(ansible_connection="ssh", ansible_host="127.0.0.1", ansible_port=1)
        everywhere = {"isthmus_estate": estate(), "isthmus_bundles": [str(ROOT / "build" / "bundle")]}
        (self.place / "hosts.yml").write_text(json.dumps({"all": {"hosts": inventory, "vars": everywhere}}))
        environment = {
            "PATH": f"{self.place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ISTHMUS_TEST_HOST": str(self.place),
            "HOME": str(self.place / "home"),
            "LANG": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "collections"),
            "ANSIBLE_NOCOLOR": "1",
        }
        command = ["ansible-playbook", "-i", str(self.place / "hosts.yml"), *options, playbook]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=240, cwd="/"
        )
        return done.returncode, recaps(done.stdout), re.sub(r"\s+", " ", done.stdout + done.stderr)

    def plan(self, *options: str, **how: Any) -> tuple[int, dict[str, Recap], str]:
        return self.run(str(self.place / "plan.yml"), *options, **how)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    made.know(planned(model(), planned(model()), forget=Forget(names=["o3"])).record)
    return made


def test_a_forgotten_host_that_is_back_is_refused_until_it_holds_nothing(site: Site) -> None:
    status, recap, said = site.plan()
    assert status == 2
    assert "planned: c1 o1 o2" in said
    assert {name: one.failed for name, one in recap.items()} == {"c1": 0, "o1": 0, "o2": 0, "o3": 1}
    assert (
        "o3 was forgotten at 2026-01-02T03:04:05Z and still holds keys of the mesh (/etc/isthmus/pki/agent.key)" in said
    )
    assert "isthmus.mesh.teardown --limit o3 -e isthmus_confirm_teardown=lab" in said
    counted = recap["o1"].ok

    shutil.rmtree(site.etc["o3"])
    status, recap, said = site.plan()
    assert (status, "planned: c1 o1 o2 o3" in said) == (0, True), said
    # Other hosts do nothing for that.
    assert recap["o1"].ok == counted

    # Named again, it is not even looked at.
    status, recap, said = site.plan("-e", '{"plan_forget": ["o3"]}', down=("o3",))
    assert (status, "planned: c1 o1 o2" in said, recap["o3"].unreachable) == (0, True, 0), said


def test_a_forgotten_host_that_is_silent_takes_no_part(site: Site) -> None:
    status, recap, said = site.plan(down=("o3",))
    assert (status, recap["o3"].unreachable, recap["o1"].failed) == (4, 1, 0)
    assert "host o3 was forgotten at 2026-01-02T03:04:05Z by alice and takes no part. Next:" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "It is not said which machines are lost. Nothing was changed. Next: ansible-playbook isthmus.mesh.forget"),
        (("-e", "isthmus_forget=o4"), "isthmus_forget=o4: the estate record has neither a host nor a cluster"),
        (
            ("-e", "isthmus_forget=o2,o1"),
            "isthmus_forget=o1: it keeps the key of cluster onprem's certificate authority",
        ),
    ],
)
def test_forget_refuses_with_words_before_anything_is_changed(site: Site, options: tuple[str, ...], words: str) -> None:
    status, recap, said = site.run("isthmus.mesh.forget", *options)
    assert status == 2
    assert words in said
    assert sum(one.changed for one in recap.values()) == 0


def test_forget_reaches_whom_it_can_and_tells_of_the_rest(site: Site) -> None:
    """o3 is stolen, and cloud, whose authority signed for its registrar, is out of reach. In check mode, so that no
    etcd is needed: the modules predict, and the authority of onprem says what it would revoke."""
    now = datetime.datetime.now(datetime.timezone.utc)
    record = copy.deepcopy(dict(planned(model()).record))
    for name, place in (("onprem", "o1"), ("cloud", "c1")):
        key, certificate = pki.new_authority(name, now)
        record[f"clusters/{name}"]["ca_certificate"] = certificate.decode()
        (site.etc[place] / "pki" / "ca.key").write_bytes(key)
        (site.etc[place] / "pki" / "ca.crt").write_bytes(certificate)
        authority = pki.Authority(name, key, certificate, "here", now)
        ledger = revocation.Ledger.read(None, "here", now, new=True)
        for host in ("o2", "o3"):
            wanted = pki.CertificateSpec(
                "root", name, place, "root", frozenset(), frozenset(), frozenset(["client"]), "root"
            )
            signed = authority.sign(wanted, pki.new_request(pki.new_key(), "root", "here"), now)
            ledger = ledger.with_certificate(signed, host, "root")
        (site.etc[place] / "pki" / "issued.json").write_text(ledger.text(now))
    site.know(record)
    for name in ("o1", "o2"):
        (site.etc[name] / "etcd.env").write_text("")
    before = {path: path.read_bytes() for path in site.place.glob("hosts/*/etc/**/*") if path.is_file()}
    status, recap, said = site.run(
        "isthmus.mesh.forget", "--check", "--diff", "-e", "isthmus_forget=o3", down=("c1", "o3")
    )
    assert status == 4, said
    ended = {name: (one.unreachable, one.failed) for name, one in recap.items() if name != "localhost"}
    assert ended == {"c1": (1, 0), "o1": (0, 0), "o2": (0, 0), "o3": (0, 0)}, said
    assert "o3 of cluster onprem is forgotten since" in said
    assert "The authority of cluster onprem revoked root of o3 (CN=root, serial" in said
    assert "root of o2" not in said
    assert "The authority of cluster cloud on c1 has not revoked what o3 may hold of it" in said
    assert "etcd of cluster cloud on c1 did not get the list" in said
    assert said.count("1 revoked certificates") == 2  # on o1 and on o2
    after = {path: path.read_bytes() for path in site.place.glob("hosts/*/etc/**/*") if path.is_file()}
    assert after == before


@pytest.mark.slow
def test_a_check_of_another_authority_predicts_the_next_step_and_says_what_follows(site: Site) -> None:
    """What later steps do is of certificates that nobody has made yet, so nothing is said of those in particular."""
    record = copy.deepcopy(dict(planned(model()).record))
    now = datetime.datetime.now(datetime.timezone.utc)
    made = {name: pki.new_authority(name, now) for name in ("onprem", "cloud")}
    for (name, (key, certificate)), place in zip(made.items(), ("o1", "c1"), strict=True):
        record[f"clusters/{name}"]["ca_certificate"] = certificate.decode()
        (site.etc[place] / "pki" / "ca.key").write_bytes(key)
        (site.etc[place] / "pki" / "ca.crt").write_bytes(certificate)
    site.know(record)
    words = ("isthmus.mesh.replace_authority", "--check", "--diff", "-e", "isthmus_replace_authority=onprem")
    status, recap, said = site.run(*words)
    assert (status, {one.failed for one in recap.values()}) == (0, {0}), said
    assert "authority of cluster onprem in the estate record" in said
    assert "Only the next step is predicted above." in said
    assert "The new authority signs: on every host of cluster onprem" in said
    assert "The old authority is trusted no more, by any host." in said
    assert "TASK [The new authority comes first]" not in said

    # The next run of one that ended after the first step.
    key, certificate = pki.new_authority("onprem", now)
    (site.etc["o1"] / "pki" / "ca.key").write_bytes(key)
    (site.etc["o1"] / "pki" / "ca.crt").write_bytes(certificate)
    record["clusters/onprem"]["ca_certificate"] += certificate.decode()
    site.know(record)
    status, recap, said = site.run(*words)
    assert (status, {one.failed for one in recap.values()}) == (0, {0}), said
    assert "TASK [The new authority comes first]" in said
    assert "The new authority signs: on every host" not in said
    assert "The old authority is trusted no more, by any host." in said
    assert "TASK [The old authority goes]" not in said
