# SPDX-License-Identifier: GPL-3.0-or-later
"""`verify` finds what is wrong, on the host where it is wrong, and names it: a dozen faults in two runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator

import pytest
from demo import EDGE
from estate_tools import PKI, Estate
from playbook import Run, play

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Signs the member's own certificate again, as it is, but for last year. Runs on the host of the CA.
EXPIRE = f"""
import datetime
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

def read(name):
    with open("{PKI}/" + name, "rb") as file:
        return file.read()

now = datetime.datetime.now(datetime.timezone.utc)
known = x509.load_pem_x509_certificate(read("etcd-peer.crt"))
authority = x509.load_pem_x509_certificate(read("ca.crt"))
made = x509.CertificateBuilder(
    authority.subject, known.subject, known.public_key(), x509.random_serial_number(),
    now - datetime.timedelta(days=400), now - datetime.timedelta(days=35), list(known.extensions),
).sign(serialization.load_pem_private_key(read("ca.key"), None), hashes.SHA256())
with open("{PKI}/etcd-peer.crt", "wb") as file:
    file.write(made.public_bytes(serialization.Encoding.PEM))
"""

# A fault: the host, the commands that make it there, and words of which verify's problem must have all. These change
# nothing that agents want of their kernels, so none of them repairs another one's fault before verify has seen it.
QUIET: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "a route is missing": (EDGE, "ip route delete 10.102.0.0/28", ("datapath:", "10.102.0.0/28", "is missing")),
    "a certificate is expired": (
        "cloud-1",
        f"/opt/isthmus/current/bin/python - <<'END'\n{EXPIRE}\nEND",
        (f"certificates: {PKI}/etcd-peer.crt: ", "expired"),
    ),
    "a key can be read": ("onprem-1", f"chmod 0644 {PKI}/peer-cloud.key", ("peer-cloud.key has mode 0644, not 0600",)),
    "a pinned CA is missing": (EDGE, f"rm {PKI}/trust/cloud.crt", (f"{PKI}/trust/cloud.crt", "is missing")),
    "a unit is stopped": (
        "onprem-3",
        "systemctl stop isthmus-dns.service",
        ("units: isthmus-dns.service is inactive",),
    ),
    "a unit is disabled": (
        "onprem-1",
        "systemctl disable isthmus-registrar.service",
        ("units: isthmus-registrar.service would not start at the next boot",),
    ),
    "a spec is changed": (
        "onprem-2",
        'sed -i \'s/"port": 8472/"port": 8473/\' /etc/isthmus/node.json',
        ("spec: /etc/isthmus/node.json is not what the inventory gives (overlay differ)",),
    ),
    "a name is resolved elsewhere": (
        "onprem-1",
        "cp /var/lib/isthmus/resolver/original /etc/resolv.conf",
        ("own resolver says nothing for web.shop.svc.clusterset.local",),
    ),
}


LOUD: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "an overlay program is gone": (
        "cloud-2",
        "tc filter delete dev isthmus0 egress",
        ("datapath: tc program overlay_egress is not attached",),
    ),
    "a backend is stopped": (
        "onprem-2",
        "systemctl stop web.service",
        ("backends: shop/web on onprem-2", "shop/web: "),
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What `verify` said of an estate with every quiet fault in it, and when every loud one was added."""

    quiet: Run
    loud: Run


@pytest.fixture(scope="module")
def found(estate: Estate) -> Iterator[Found]:
    # An agent repairs its datapath five minutes after it started: not in the middle of this.
    for host in (EDGE, "cloud-1", "cloud-2"):
        estate.lab.exec(host, ["systemctl", "restart", "isthmusd.service"])
    estate.converged()
    try:
        estate.etcdctl(EDGE, "auth", "disable")
        stray_map_entry(estate, "cloud-1")
        for host, commands, _ in QUIET.values():
            estate.lab.exec(host, ["sh", "-ec", commands])
        quiet = play("verify", check=False)
        estate.etcdctl("onprem-1", "del", "isthmus/v1/services/shop/echo")
        for host, commands, _ in LOUD.values():
            estate.lab.exec(host, ["sh", "-ec", commands])
        yield Found(quiet, play("verify", check=False))
    finally:
        estate.put_right()
        for host in estate.lab.hosts:
            estate.lab.exec(host, ["systemctl", "restart", "isthmusd.service"])
        play("site")
        estate.converged()
    # The faults were all there was, and they are gone.
    play("verify")


def stray_map_entry(estate: Estate, host: str) -> None:
    """Packets to 10.101.0.99 would go where those to another address go."""
    place = f"/proc/{estate.lab.leader(estate.lab.hosts[host])}/root/sys/fs/bpf/isthmus/v1/ipcache_host"
    dumped = subprocess.run(["bpftool", "-j", "map", "dump", "pinned", place], capture_output=True, check=True).stdout
    for entry in json.loads(dumped):
        key = [int(byte, 16) for byte in entry["key"]]
        where = bytes(key).find(bytes([10, 101, 0]))
        if where >= 0:
            key[where + 3] = 99
            numbers = [f"0x{byte:02x}" for byte in key]
            update = ["bpftool", "map", "update", "pinned", place, "key", *numbers, "value", *entry["value"]]
            subprocess.run(update, check=True)
            return
    raise AssertionError("no entry of onprem in the map")


def test_verify_ends_with_an_error_and_changes_nothing(found: Found) -> None:
    for run in (found.quiet, found.loud):
        assert run.status != 0
        assert run.changed == {}


@pytest.mark.parametrize("fault", [*QUIET, *LOUD])
def test_a_fault_is_found_where_it_is_and_named(found: Found, fault: str) -> None:
    host, _, words = {**QUIET, **LOUD}[fault]
    told = (found.quiet if fault in QUIET else found.loud).problems(host)
    assert [word for word in words if word not in told] == [], told


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (EDGE, ("etcd: access control is off",)),
        ("cloud-1", ("datapath: ", "ipcache_host", "10.101.0.99", "is not wanted")),
    ],
    ids=["access control is off", "a stray map entry"],
)
def test_a_fault_in_etcd_or_a_map_is_found_and_named(found: Found, host: str, words: tuple[str, ...]) -> None:
    told = found.quiet.problems(host)
    assert [word for word in words if word not in told] == [], told


def test_a_definition_that_is_lost_is_named(found: Found) -> None:
    assert "etcd: isthmus/v1/services/shop/echo, a service of the inventory, is missing" in found.loud.problems(
        "onprem-1"
    )
