#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The mesh's image is in the registry that the operator names."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: image_push
short_description: Push the mesh's container image
version_added: 1.0.0
description:
  - Runs on the controller. Compares the image of that name in the registry with the archive by digest, and pushes the
    archive with C(skopeo) where they differ.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  archive:
    description: The OCI archive that C(make image) makes, on the controller.
    type: path
    required: true
  image:
    description: Registry, name and tag.
    type: str
    required: true
  username:
    description: User of the registry. Without it skopeo's own logins count (C(skopeo login), C(docker login)).
    type: str
  password:
    description: Their password or token. It is given to skopeo in a file that nobody else can read.
    type: str
  ca_certificates:
    description: Directory with the authority of a registry that is not publicly known, as C(ca.crt).
    type: path
requirements:
  - skopeo on the controller.
seealso:
  - module: isthmus.mesh.image_import
"""

EXAMPLES = r"""
- name: The registry has the image
  isthmus.mesh.image_push:
    archive: build/isthmus-1.0.0.oci.tar
    image: registry.example/isthmus:1.0.0
    username: pusher
    password: "{{ vaulted_password }}"
  delegate_to: localhost
"""

RETURN = r"""
digest:
  description: Digest of the image's manifest.
  returned: success
  type: str
  sample: sha256:3fc1...
"""

import base64
import contextlib
import hashlib
import json
import os
import tempfile

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import oci_image
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

UNKNOWN = ("manifest unknown", "name unknown", "not found", "404")


@contextlib.contextmanager
def login(module):
    """Options of skopeo for the registry's credentials, while they are in a file."""
    user, registry = module.params["username"], module.params["image"].split("/", 1)[0]
    if not user:
        yield []
        return
    secret = base64.b64encode(f"{user}:{module.params['password'] or ''}".encode()).decode()
    with tempfile.NamedTemporaryFile("w", dir=module.tmpdir, suffix=".json") as file:  # 0600
        json.dump({"auths": {registry: {"auth": secret}}}, file)
        file.flush()
        yield ["--authfile", file.name]


def skopeo(module, *words):
    """Exit status, what it wrote as bytes, what it said."""
    done = module.run_command(
        ["skopeo", *words], environ_update={"LC_ALL": "C.UTF-8"}, handle_exceptions=False, encoding=None
    )
    return done[0], done[1], done[2].decode("utf-8", "replace")


def present(module, options, image):
    """Digest of what the registry has; empty when there is none of that name."""
    code, out, err = skopeo(module, "inspect", *options, "--raw", f"docker://{image}")
    if code == 0:
        return f"sha256:{hashlib.sha256(out).hexdigest()}"
    if any(word in err.lower() for word in UNKNOWN):
        return ""
    module.fail_json(
        msg=f"The registry of {image} cannot be asked: {last(err)}. Nothing was pushed. Next: correct isthmus_image or "
        "the credentials (isthmus_image_username, isthmus_image_password), and run again."
    )


def last(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:500].rstrip(".") if lines else "it said nothing"


def main():
    module = AnsibleModule(
        argument_spec={
            "archive": {"type": "path", "required": True},
            "image": {"type": "str", "required": True},
            "username": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "ca_certificates": {"type": "path"},
        },
        required_by={"username": "password"},
        supports_check_mode=True,
    )
    archive, image = module.params["archive"], module.params["image"]
    changes = Changes(module)
    try:
        digest = oci_image.manifest_digest(archive)
    except oci_image.ImageError as exc:
        module.fail_json(msg=f"{exc}.")
    registry = image.split("/", 1)[0]
    if "/" not in image or not (":" in registry or "." in registry or registry == "localhost"):
        module.fail_json(
            msg=f"{image} names no registry, so it cannot be pushed. Next: set isthmus_image to "
            "<registry>/<name>:<tag>, or import the image on the nodes (isthmus_image_import)."
        )
    certificates = module.params["ca_certificates"]
    try:
        with login(module) as options:
            found = present(module, [*options, *(["--cert-dir", certificates] if certificates else [])], image)
            if found != digest:
                changes.note(image, found and f"digest {found}", f"digest {digest}")
                if not module.check_mode:
                    more = ["--dest-cert-dir", certificates] if certificates else []
                    source = f"oci-archive:{os.path.abspath(archive)}"
                    command = ["copy", "--quiet", "--preserve-digests", *options, *more, source, f"docker://{image}"]
                    # The policy asks for signatures of what is read, and an archive of our own has none.
                    code, _out, err = skopeo(module, "--insecure-policy", *command)
                    if code != 0:
                        module.fail_json(
                            msg=f"{image} could not be pushed: {last(err)}. Next: see that the user may write there, "
                            "and run again."
                        )
    except OSError as exc:
        module.fail_json(
            msg=f"skopeo cannot be run: {exc.strerror}. Next: install it here (Debian: apt install skopeo)."
        )
    module.exit_json(**changes.result(digest=digest))


if __name__ == "__main__":
    main()
