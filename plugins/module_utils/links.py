# SPDX-License-Identifier: BSD-2-Clause
"""Links and addresses of a host, as `ip` tells them."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def listed(module: AnsibleModule, what: str) -> list[dict[str, Any]]:
    """`ip -json -details WHAT show`, of `link` or `address`; nothing on a host that lacks `ip`."""
    if module.get_bin_path("ip", opt_dirs=["/usr/sbin", "/sbin"]):
        code, out, _err = module.run_command(["ip", "-json", "-details", what, "show"])
        with contextlib.suppress(ValueError):
            return [entry for entry in json.loads(out if code == 0 else "[]") if entry]
    return []


def of_address(module: AnsibleModule, address: str) -> str:
    """Name of the link that has an address; "" for none."""
    for entry in listed(module, "address"):
        if any(one.get("local") == address for one in entry.get("addr_info", [])):
            return str(entry["ifname"])
    return ""
