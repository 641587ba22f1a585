# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook as AWX runs it, by ansible-runner in an execution environment that keeps nothing, and what it tells."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from estate_tools import PKI, Estate
from installation import variant
from isthmus_lab import Lab
from playbook import ROOT, Run, play, recaps

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

# A job's PATH: the runner's own tools and what they call. A compiler is not among it.
TOOLS = ("sh", "ssh", "env", "sleep", "stat", "mkdir", "chmod", "rm", "cat", "git", "tar", "gzip")
# Its own mounts: the project and the collections cannot be written, nothing is kept in the user's home.
ENTER = (
    'for place in "$1" "$2"; do mount --bind "$place" "$place" && mount -o remount,bind,ro "$place" || exit; done; '
    'mkdir -p /root/.ansible && mount -t tmpfs -o size=64m tmpfs /root/.ansible && cd "$1" && shift 2 && exec "$@"'
)


class Secrets:
    """What must not be told: another team's variables and every private key in the estate."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.canary = f"canary-{uuid.uuid4().hex}"
        self.vaulted = f"vaulted-{uuid.uuid4().hex}"

    def everything(self) -> dict[str, str]:
        found = {"another team's variable": self.canary, "another team's vault": self.vaulted}
        for host in self.lab.hosts:
            listed = self.lab.exec(host, ["sh", "-c", f"tail -n +1 {PKI}/*.key"]).stdout
            name = ""
            for line in listed.splitlines():
                if line.startswith("==> "):
                    name = line
                elif len(line) > 30 and "PRIVATE KEY" not in line:
                    found[f"{host}: {name}: {line[:6]}..."] = line
        assert len(found) > 2 * len(self.lab.hosts)
        return found

    def told(self, text: str) -> list[str]:
        return [what for what, secret in self.everything().items() if secret in text]


@pytest.fixture
def secrets(estate: Estate) -> Secrets:
    return Secrets(estate.lab)


@pytest.fixture
def inventory(secrets: Secrets, tmp_path: Path) -> Path:
    """The lab's, with another team's secrets: one in plain text, one in a vault that nobody gives a password for."""
    key = tmp_path / "password"
    key.write_text(uuid.uuid4().hex)
    tool = Path(sys.executable).with_name("ansible-vault")
    words = [str(tool), "encrypt_string", "--vault-password-file", str(key), secrets.vaulted]
    vault = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    key.unlink()
    made = variant(tmp_path / "inventory", lambda _, __: None, {"billing_token": secrets.canary})
    (made / "group_vars" / "mesh.yml").write_text(f"billing_password: {vault}")
    return made


def test_an_execution_environment_finds_the_estate_as_it_should_be(
    estate: Estate, secrets: Secrets, inventory: Path, tmp_path: Path
) -> None:
    place, tools = tmp_path / "job", tmp_path / "bin"
    for directory in (place / "project", place / "env", tools):
        directory.mkdir(parents=True)
    bin_directory = Path(sys.executable).parent
    for tool in TOOLS:
        found = shutil.which(tool)
        if found:
            (tools / tool).symlink_to(found)
    for tool in ("ansible-playbook", "ansible-runner", "python3"):
        (tools / tool).symlink_to(bin_directory / tool)
    assert not any((tools / compiler).exists() for compiler in ("cc", "gcc", "clang", "make"))
    done = subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", "setsid", "--wait", "sh", "-c", ENTER, "sh"),
            *(str(place / "project"), str(ROOT / "build" / "collections")),
            *("env", "-i", f"PATH={tools}", "LANG=C.UTF-8", "AWX_ISOLATED_DATA_DIR=/nowhere"),
            f"ANSIBLE_COLLECTIONS_PATH={ROOT / 'build' / 'collections'}",
            f"ANSIBLE_CONFIG={ROOT / 'tests' / 'lab' / 'ansible.cfg'}",
            *(f"{name}={value}" for name, value in os.environ.items() if name.startswith("ISTHMUS_LAB_")),
            str(bin_directory / "ansible-runner"),
            *("run", str(place), "--playbook", "isthmus.mesh.site", "--inventory", str(inventory), "--ident", "job"),
            *("--cmdline=-vvv", "--quiet"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    artifacts = place / "artifacts" / "job"
    output = (artifacts / "stdout").read_text()
    assert done.returncode == 0, output[-4000:] + done.stdout + done.stderr
    run = Run(done.returncode, output, recaps(output))
    assert set(run.hosts) == set(estate.lab.hosts)
    assert run.changed == {}
    events = [json.loads(path.read_text()) for path in (artifacts / "job_events").glob("*.json")]
    assert any(event["event"] == "playbook_on_stats" for event in events)
    everything = [path.read_text(errors="replace") for path in place.rglob("*") if path.is_file()]
    assert secrets.told("\n".join([*everything, done.stdout, done.stderr])) == []


def test_a_run_that_makes_keys_and_certificates_tells_none_of_them(
    estate: Estate, secrets: Secrets, inventory: Path
) -> None:
    """-vvv --diff of a run that makes a key anew, has it signed, writes it, and shows all it does."""
    host = "cloud-2"
    before = estate.lab.exec(host, ["cat", f"{PKI}/agent.key"]).stdout
    try:
        estate.lab.exec(host, ["rm", f"{PKI}/agent.key", f"{PKI}/agent.crt"])
        run = play("site", "-vvv", "--diff", inventory=inventory)
    finally:
        play("site")
    assert set(run.changed) == {host}
    assert estate.lab.exec(host, ["cat", f"{PKI}/agent.key"]).stdout != before
    assert f"{PKI}/agent.key" in run.output
    assert secrets.told(run.output) == []
    assert not any(line in run.output for line in before.splitlines() if len(line) > 30 and "PRIVATE KEY" not in line)
