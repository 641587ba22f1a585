# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The digest of the image in an OCI archive on the controller."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError
from ansible_collections.isthmus.mesh.plugins.module_utils import oci_image

DOCUMENTATION = r"""
---
name: image_digest
short_description: The digest of the image in an OCI archive
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Reads the archive that C(make image) makes, on the controller.
options:
  _input:
    description: Path of the archive.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show which image it is
  ansible.builtin.debug:
    msg: "{{ 'build/isthmus-1.0.0.oci.tar' | isthmus.mesh.image_digest }}"
"""

RETURN = r"""
_value:
  description: Digest of the image's manifest.
  type: str
  sample: sha256:3fc1...
"""


def image_digest(archive):
    try:
        return oci_image.manifest_digest(archive)
    except oci_image.ImageError as exc:
        raise AnsibleFilterError(f"{exc}.") from exc


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"image_digest": image_digest}
