# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The agent bundles that the controller has (docs/architecture.md, "Bundle"). Private to this collection."""

from __future__ import annotations

import json
import os

from ansible.errors import AnsibleError
from ansible.module_utils.common.yaml import yaml_load
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import versions

COLLECTION = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
MAKE = "Make one with `make bundle` in the collection's sources, or install the built collection, which carries it."


def collection_version():
    """The version of this collection: the installed artifact's MANIFEST.json, in the sources galaxy.yml.

    Raises AnsibleError when neither can be read.
    """
    try:
        try:
            with open(os.path.join(COLLECTION, "MANIFEST.json"), encoding="utf-8") as file:
                version = json.load(file)["collection_info"]["version"]
        except FileNotFoundError:
            with open(os.path.join(COLLECTION, "galaxy.yml"), encoding="utf-8") as file:
                version = yaml_load(file)["version"]
        versions.order(version)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise AnsibleError(
            f"The version of isthmus.mesh in {COLLECTION} is not known: {exc}. Nothing was changed on any host. Next: "
            "install it anew with `ansible-galaxy collection install isthmus.mesh --force`"
        ) from exc
    return version


def platforms(directories):
    """The platforms of every manifest, in order; each with `version` and the `place` of its archive.

    Raises AnsibleError when no directory has a manifest, when one cannot be read or is of another version than the
    collection.
    """
    own = collection_version()
    found = []
    for directory in directories:
        name = os.path.join(directory, "bundle.json")
        try:
            with open(name, encoding="utf-8") as file:
                manifest = json.load(file)
        except FileNotFoundError:
            continue
        except ValueError as exc:
            raise AnsibleError(f"The bundle's manifest {name} is not JSON: {exc}. {MAKE}") from exc
        if manifest.get("schema") != 1:
            raise AnsibleError(f"{name} has schema {manifest.get('schema')!r}; this collection reads 1. {MAKE}")
        if manifest["version"] != own:
            raise AnsibleError(
                f"{name} is a bundle of isthmus.mesh {manifest['version']}, and this collection is {own}. Why: agent "
                f"and collection are of one version. Next: `make bundle` in the sources of {own}, or "
                f"{versions.install(manifest['version'])}"
            )
        for item in manifest["platforms"]:
            place = os.path.join(directory, item["archive"])
            found.append({**item, "version": manifest["version"], "place": place})
    if not found:
        raise AnsibleError(
            f"There is no agent bundle: no bundle.json in {', '.join(directories)} on the controller. {MAKE}"
        )
    return found
