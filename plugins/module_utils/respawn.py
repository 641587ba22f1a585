# SPDX-License-Identifier: BSD-2-Clause
"""Run a module's work under the agent bundle's Python.

Modules that need etcd or ``cryptography`` do not ask the operator to install either: the bundle under
``/opt/isthmus`` has both, and the module starts itself again under its interpreter.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ansible.module_utils.common.respawn import has_respawned, respawn_module

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

BUNDLE_PYTHON = "/opt/isthmus/current/bin/python"


def bundle_module(module: AnsibleModule, name: str, required: bool = True, needs: str = "") -> Any:
    """Import ``name`` (for example ``isthmus_agent.pki``), under the bundle's interpreter when needed.

    Returns the imported module. Returns ``None`` in check mode on a host that has no bundle yet, or one of an older
    version without ``name``, or without what the caller ``needs`` of it: that then predicts without it. Returns
    ``None`` also when not ``required``.
    Does not return when it respawns. Fails the module, naming the next step, when the bundle is missing or broken.
    """
    # gRPC's own handling of fork() makes programs fail that the module starts while a connection to etcd is open: its
    # threads come back in the child and die on the file descriptors that are closed before exec.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    try:
        found = importlib.import_module(name)
        return None if needs and module.check_mode and not hasattr(found, needs) else found
    except ImportError as exc:
        reason = str(exc)
    if not has_respawned() and os.path.exists(BUNDLE_PYTHON):
        respawn_module(BUNDLE_PYTHON)
    if module.check_mode or not required:
        return None
    if has_respawned():
        module.fail_json(
            msg=f"{name} cannot be imported under {BUNDLE_PYTHON}: {reason}. "
            "The agent bundle is damaged; run the isthmus.mesh.bundle role on this host again."
        )
    return module.fail_json(
        msg=f"{BUNDLE_PYTHON} does not exist on this host, and this module needs the agent bundle for {name}. "
        "Run the isthmus.mesh.bundle role (or the isthmus.mesh.site playbook) first."
    )
