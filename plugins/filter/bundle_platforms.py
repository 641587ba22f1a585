# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""For which platforms the controller has an agent bundle."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: bundle_platforms
short_description: Platforms for which the controller has an agent bundle
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Reads the manifests C(bundle.json) in directories on the controller.
options:
  _input:
    description: Directories on the controller.
    type: list
    elements: path
    required: true
"""

EXAMPLES = r"""
- name: Show the platforms
  ansible.builtin.debug:
    msg: "{{ ['/srv/isthmus/bundles'] | isthmus.mesh.bundle_platforms }}"
"""

RETURN = r"""
_value:
  description: One dictionary per platform, with C(arch), C(python) and C(version).
  type: list
  elements: dict
"""

from ansible_collections.isthmus.mesh.plugins.plugin_utils.bundles import platforms


def bundle_platforms(directories):
    """Architecture, Python version and own version of every bundle."""
    return [{key: item[key] for key in ("arch", "python", "version")} for item in platforms(directories)]


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"bundle_platforms": bundle_platforms}
