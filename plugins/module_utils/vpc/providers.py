# SPDX-License-Identifier: BSD-2-Clause
"""What the modules for VPCs share: options, the provider's part by its name, and failures while it looks."""

from __future__ import annotations

import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import missing_required_lib
from ansible_collections.isthmus.mesh.plugins.module_utils.vpc import aws, azure, google, plan
from ansible_collections.isthmus.mesh.plugins.module_utils.vpc.steps import Plan, ProviderError, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from ansible.module_utils.basic import AnsibleModule

ARGUMENTS: dict[str, Any] = {
    "provider": {"type": "str", "choices": ["aws", "google", "azure"], "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "owner": {"type": "str", "required": True},
    "endpoint": {"type": "str"},
}
PLACE: dict[str, Any] = {
    "network": {"type": "str", "required": True},
    "region": {"type": "str"},
    "profile": {"type": "str"},
    "project": {"type": "str"},
    "subscription": {"type": "str"},
    "resource_group": {"type": "str"},
}
LIBRARIES = {
    "aws": {"boto3": "boto3"},
    "google": {"googleapiclient": "google-api-python-client"},
    "azure": {"azure.mgmt.network": "azure-mgmt-network", "azure.identity": "azure-identity"},
}


def load(module: AnsibleModule) -> ModuleType:
    """The part for the module's provider; fails the module when that provider's client is not installed."""
    name = module.params["provider"]
    for library, package in LIBRARIES[name].items():
        try:
            import_module(library)
        except ImportError:
            module.fail_json(msg=missing_required_lib(package), exception=traceback.format_exc())
    return {"aws": aws, "google": google, "azure": azure}[name]


def planned(module: AnsibleModule, look: Callable[[Mapping[str, Any]], Plan]) -> Plan:
    """The plan that `look` makes from the module's options; fails the module where the provider refuses to be read."""
    found = plan.owner_problem(module.params["owner"])
    if found:
        module.fail_json(msg=f"nothing was changed. {found}")
    try:
        return look(module.params)
    except ProviderError as exc:
        if exc.gone and module.params["state"] == "absent":
            nothing = Plan()
            nothing.gone(exc)
            return nothing
        if exc.permission:
            return module.fail_json(msg=f"nothing was changed; {refused({exc.permission: f'call {exc}'})}")
        return module.fail_json(msg=f"nothing was changed. The provider refuses to be looked at: {exc}")
