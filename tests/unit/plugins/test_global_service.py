# SPDX-License-Identifier: GPL-3.0-or-later
"""global_service's options and the inventory's keys of the same names are one thing."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import schema
from ansible_collections.isthmus.mesh.plugins.modules import global_service

OPTIONS = yaml.safe_load(global_service.DOCUMENTATION)["options"]
# The module exists to register services at run time for all clusters; the inventory's services are of their cluster
# unless they say so.
DIFFERENT = {"global"}


@pytest.mark.parametrize(
    ("options", "table"),
    [
        (OPTIONS, schema.SERVICE),
        (OPTIONS["ports"]["suboptions"], schema.SERVICE_PORT),
        (OPTIONS["backends"]["suboptions"], schema.SERVICE_BACKENDS),
        (OPTIONS["health"]["suboptions"], schema.HEALTH),
    ],
    ids=["service", "port", "backends", "health"],
)
def test_options_are_the_inventorys_keys(options: dict[str, Any], table: schema.Table) -> None:
    assert set(table.keys) - set(options) <= {"clusters"}  # the cluster is that of the host
    assert set(options) <= set(table.keys)
    for name in set(options) - DIFFERENT:
        option, key = options[name], table.keys[name]
        if isinstance(key.kind, schema.Choice):
            assert option["choices"] == list(key.kind.values)
        if "default" in option:
            assert option["default"] == key.default
