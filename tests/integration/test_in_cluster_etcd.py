# SPDX-License-Identifier: GPL-3.0-or-later
"""Whom a member of an etcd inside a cluster takes for a member, with the settings that its pod has."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import in_cluster
from installations import installation
from integration.etcd_fixture import EtcdServer

TRANSLATED = "127.0.0.2"  # neither an address in the certificates nor that of a name in them
OF_MEMBERS = ("ETCD_PEER_CERT_ALLOWED_CN", "ETCD_EXPERIMENTAL_PEER_SKIP_CLIENT_SAN_VERIFICATION")


def settings() -> tuple[str, ...]:
    """What the pod's environment says of members that dial this one, as options."""
    values = {one["name"]: one.get("value", "") for one in in_cluster.etcd_environment(installation())}
    return tuple(f"--{name[5:].lower().replace('_', '-')}={values[name]}" for name in OF_MEMBERS if name in values)


def asks(server: EtcdServer, name: str) -> int:
    """HTTP's status for who dials the peer port with a certificate of that name, from a translated address."""
    tls = ssl.create_default_context(cafile=str(server.ca.crt))
    tls.load_cert_chain(*server.ca.issue(name))
    connection = http.client.HTTPSConnection(
        "127.0.0.1", server.peer_port, timeout=10, context=tls, source_address=(TRANSLATED, 0)
    )
    try:
        connection.request("GET", "/version")
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_member_is_known_by_its_name_when_its_address_is_translated_on_the_way(tmp_path: Path) -> None:
    """As the bridge plugin with ipMasq does between nodes, before there is a mesh that keeps the source."""
    with EtcdServer(tmp_path, arguments=settings()) as server:
        assert asks(server, in_cluster.PEER_CN) == 200
        with pytest.raises((OSError, http.client.HTTPException)):
            asks(server, "isthmus-agent-k1")
