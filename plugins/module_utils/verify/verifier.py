# SPDX-License-Identifier: BSD-2-Clause
"""What all checks of a host share: what the inventory gives for it, how they ask its agent, and where they put what
they find."""

from __future__ import annotations

import collections
import pathlib
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import openings
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module

if TYPE_CHECKING:
    from collections.abc import Callable

    from ansible.module_utils.basic import AnsibleModule

SITE = "run the playbook isthmus.mesh.site"


class Verifier:
    """Collects problems; each check looks at one side of the host and ends early only when it can see no more. What
    checks find besides: `warnings` of the agent, `remarks`, `loss` and `unreached` hosts."""

    SOCKET = pathlib.Path("/run/isthmus/agent.sock")
    NODE = "/etc/isthmus/node.json"
    PKI = "/etc/isthmus/pki"
    PAUSE = 2  # seconds from one look to the next

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.spec = module.params["spec"]
        self.record = module.params["record"]
        self.services = module.params["services"]
        self.hosts = [host for host in module.params["hosts"] if host["name"] != self.spec["host"]]
        self.timeout = module.params["timeout"]
        self.cluster = self.spec["cluster"]["name"]
        self.reached = {host["cluster"] for host in module.params["hosts"]}
        self.problems: list[str] = []
        self.loss: dict[str, Any] | None = None
        self.remarks: list[str] = []  # for who runs the playbook
        self.warnings: list[str] = []
        self.unreached: list[dict[str, Any]] | None = None
        self.proofs: collections.Counter[str] = collections.Counter()

    def check(self, kind: str, good: Any, problem: str) -> Any:
        """One fact: counted when it is so, a problem when not."""
        if good:
            self.proofs[kind] += 1
        else:
            self.problems.append(f"{kind}: {problem}")
        return good

    def look(self, kind: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """One side of the host. What nobody thought of on it must not hide what the other sides show."""
        try:
            return method(self, *arguments)
        except Exception as exc:
            self.check(kind, False, f"this could not be looked at to the end: {type(exc).__name__}: {exc}; {SITE}")
            return None

    def bundle(self, name: str) -> Any:
        """A module of the agent's bundle (`bundle_module`)."""
        return bundle_module(self.module, name)

    def ask(self) -> Any:
        """The status that the agent tells."""
        return self.bundle("isthmus_agent.cli.client").ask(self.SOCKET, "/v1/status")

    def sites(self) -> dict[tuple[str, str], str]:
        """The site of every other host of the record, by cluster and name."""
        return {
            (cluster, name): entry["site"]
            for cluster, document in openings.documents_of(self.record).items()
            for name, entry in document["hosts"].items()
            if name != self.spec["host"]
        }
