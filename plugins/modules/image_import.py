#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The mesh's image is in a node's containerd, where there is no registry."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: image_import
short_description: Import the mesh's container image on a node
version_added: 1.0.0
description:
  - Compares the image of that name in containerd, namespace C(k8s.io), with the digest. Without O(archive) it only says
    whether the archive is needed, so that it is copied where it is.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  image:
    description: Name and tag that pods use, with a registry in front (C(localhost/isthmus:1.0.0)).
    type: str
    required: true
  digest:
    description: Digest of the image's manifest, from the filter P(isthmus.mesh.image_digest#filter).
    type: str
    required: true
  archive:
    description: The OCI archive that C(make image) makes, on the node.
    type: path
seealso:
  - module: isthmus.mesh.image_push
"""

EXAMPLES = r"""
- name: Does the node need the image
  isthmus.mesh.image_import:
    image: localhost/isthmus:1.0.0
    digest: "{{ 'build/isthmus-1.0.0.oci.tar' | isthmus.mesh.image_digest }}"
  register: image
"""

RETURN = r"""
needed:
  description: Whether containerd lacks the image.
  returned: success
  type: bool
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

CTR = ("ctr", "--namespace", "k8s.io", "images")


def ctr(module, *words):
    try:
        code, out, err = module.run_command([*CTR, *words], handle_exceptions=False)
    except OSError as exc:
        module.fail_json(
            msg=f"ctr cannot be run: {exc.strerror}. It comes with containerd. Next: name only nodes that use "
            "containerd in isthmus_image_import, or push the image to a registry."
        )
    if code != 0:
        said = (err or out).strip().splitlines()[-1:] or ["it said nothing"]
        module.fail_json(msg=f"`{' '.join([*CTR, *words])}` failed: {said[0]}. Next: put that right and run again.")
    return out


def images(module):
    """Digest by name of what containerd has."""
    rows = (line.split() for line in ctr(module, "list").splitlines()[1:])
    return {row[0]: row[2] for row in rows if len(row) > 2}  # REF TYPE DIGEST ...


def main():
    module = AnsibleModule(
        argument_spec={
            "image": {"type": "str", "required": True},
            "digest": {"type": "str", "required": True},
            "archive": {"type": "path"},
        },
        supports_check_mode=True,
    )
    image, digest, archive = (module.params[name] for name in ("image", "digest", "archive"))
    changes = Changes(module)
    found = images(module).get(image, "")
    if found == digest:
        module.exit_json(**changes.result(needed=False))
    if archive is None and not module.check_mode:
        module.exit_json(**changes.result(needed=True))
    changes.note(image, found and f"digest {found}", f"digest {digest}")
    if not module.check_mode:
        ctr(module, "import", archive)
        # It has the name that is in the archive now.
        named = [name for name, has in images(module).items() if has == digest]
        if named and image not in named:
            ctr(module, "tag", "--force", named[0], image)
        after = images(module).get(image, "")
        if after != digest:
            module.fail_json(
                msg=f"containerd has {image} with digest {after or 'none'} after the import of {archive}, not "
                f"{digest}. Next: see that the archive was copied whole, and run again."
            )
    module.exit_json(**changes.result(needed=True))


if __name__ == "__main__":
    main()
