# SPDX-License-Identifier: BSD-2-Clause
"""How the modules that read and write a cluster's documents find its etcd from a member's host."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit
from ansible_collections.isthmus.mesh.plugins.module_utils.files import read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import spec, versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

NODE = "/etc/isthmus/node.json"
ESTATE = "/etc/isthmus/estate.json"
PKI = "/etc/isthmus/pki"
OWNER = "inventory"  # of services, in etcd


def read_json(path: str) -> Any:
    """The file's JSON; None when there is no file. ValueError when it is damaged."""
    content = read_bytes(path)
    return None if content is None else json.loads(content)


def own_node(module: AnsibleModule) -> Any:
    """The spec on this host; fails the module on a host that is no member of the mesh.

    A pod of etcd has none: what it knows of its cluster and how to reach its etcd stands in the same places.
    """
    try:
        node = read_json(NODE)
    except ValueError as exc:
        return module.fail_json(msg=f"{NODE} is damaged ({exc}). Run the isthmus.mesh.site playbook on this host")
    if node is None and (inside := _own_pod()) is not None:
        return inside
    if node is None:
        module.fail_json(msg=f"{NODE} does not exist: this host is no member of the mesh. Run isthmus.mesh.site first")
    if node.get("schema", 0) > spec.SCHEMA:
        module.fail_json(
            msg=f"{NODE} has schema {node['schema']}, newer than {spec.SCHEMA}, the newest that is known here; "
            f"a newer one made this host. Nothing was changed. Next: {versions.LATEST}, and run again"
        )
    return node


def _own_pod() -> dict[str, Any] | None:
    """Of a cluster whose control plane is in it, which is a Kubernetes cluster, as its etcd's pods have it."""
    settings = etcd_settings()
    cluster = etcd_unit.cluster_of(settings) if in_pod() else ""
    if not cluster:
        return None
    etcd = dict(zip(("ca", "cert", "key"), operator_files(cluster)))
    return {
        "cluster": {"name": cluster, "kubernetes": {}},
        "etcd": {"endpoints": [etcd_unit.local_url(settings)], **etcd},
    }


def endpoints_from_record(record: Mapping[str, Any], cluster: str) -> list[str]:
    """Client endpoints of a cluster's members, for somebody on one of their hosts."""
    document = record["clusters/" + cluster]
    etcd, hosts = document["etcd"], document["hosts"]
    port = etcd["client_port"]
    others = [f"https://{hosts[name]['underlay4']}:{port}" for name in etcd["members"] if name in hosts]
    return [f"https://127.0.0.1:{port}", *others]


def etcd_settings() -> dict[str, str]:
    """Settings of the member on this host, or of the pod that this is; none where there is no member."""
    found = etcd_unit.settings((read_bytes(etcd_unit.ENVIRONMENT) or b"").decode(errors="replace"))
    return found or {key: value for key, value in os.environ.items() if key.startswith("ETCD_")}


def in_pod() -> bool:
    """Whether this is a pod of etcd, which has its settings from its environment."""
    return read_bytes(etcd_unit.ENVIRONMENT) is None and bool(etcd_settings())


def has_etcd_data() -> bool:
    """Whether a member's data is here."""
    return os.path.isdir(os.path.join(etcd_settings().get("ETCD_DATA_DIR", etcd_unit.DATA), "member"))


def operator_files(cluster: str) -> tuple[str, str, str]:
    """CA, certificate and key of the operator on an etcd host of `cluster`."""
    return f"{PKI}/trust/{cluster}.crt", f"{PKI}/operator.crt", f"{PKI}/operator.key"


def has_operator(cluster: str) -> bool:
    """Whether this host has what is needed to write to the cluster's etcd."""
    return all(os.path.exists(path) for path in operator_files(cluster))


def show(changes: Changes, made: Iterable[Any]) -> None:
    """Put changed keys (`isthmus_agent.estate_admin.Change`) into the diff, as indented JSON."""
    for change in made:
        changes.note(change.key, _pretty(change.before), _pretty(change.after))


def _pretty(text: str) -> str:
    try:
        return json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n" if text else ""
    except ValueError:
        return text
