# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The agent bundles that the controller has (docs/architecture.md, "Bundle"). Private to this collection."""

from __future__ import annotations

import json
import os

from ansible.errors import AnsibleError

MAKE = "Make one with `make bundle` in the collection's sources, or install the built collection, which carries it."


def platforms(directories):
    """The platforms of every manifest, in order; each with `version` and the `place` of its archive.

    Raises AnsibleError when no directory has a manifest, or when one cannot be read.
    """
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
        for item in manifest["platforms"]:
            place = os.path.join(directory, item["archive"])
            found.append({**item, "version": manifest["version"], "place": place})
    if not found:
        raise AnsibleError(
            f"There is no agent bundle: no bundle.json in {', '.join(directories)} on the controller. {MAKE}"
        )
    return found
