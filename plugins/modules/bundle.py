#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bundle
short_description: Lay down the agent bundle
version_added: 1.0.0
description:
  - Installs the agent, its Python dependencies and libbpf into a virtual environment of its own below C(/opt/isthmus),
    and switches C(/opt/isthmus/current) to it in one step.
  - The action plugin of the same name asks the host what it has, and uploads the files only when they differ. Nothing
    is downloaded by the host.
  - An interrupted installation is never used and is made anew by the next run. The environment before it stays, for a
    way back; older ones are removed.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  path:
    description:
      - Directory on the controller with the bundle's C(bundle.json) and files.
    type: path
    required: true
  wheelhouse:
    description:
      - Directory on the controller, or URL of a tar archive of one, with third-party wheels and their C(bundle.json),
        for platforms whose wheels the bundle does not carry.
    type: str
  wheelhouse_sha256:
    description:
      - SHA-256 of the archive, in hexadecimal; required when O(wheelhouse) is a URL.
    type: str
  python:
    description:
      - Interpreter for the environment, instead of the newest one found that the bundle fits.
    type: path
seealso:
  - module: isthmus.mesh.node
"""

EXAMPLES = r"""
- name: The agent's software is on the host
  isthmus.mesh.bundle:
    path: "{{ role_path }}/files"
"""

RETURN = r"""
digest:
  description: Digest of the bundle's files for this host.
  returned: always
  type: str
version:
  description: Version of the bundle.
  returned: always
  type: str
  sample: 1.0.0
python:
  description: Version of the environment's interpreter.
  returned: always
  type: str
  sample: "3.11"
"""

import hashlib
import json
import os
import platform
import shutil
import tarfile
import tempfile

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import bundle
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "wheelhouse": {"type": "str"},
            "wheelhouse_sha256": {"type": "str"},
            "python": {"type": "path"},
            # From the action plugin, never from a playbook.
            "_manifest": {"type": "dict"},
            "_payload": {"type": "path"},
        },
        supports_check_mode=True,
    )
    manifest = module.params["_manifest"]
    if manifest is None:
        module.fail_json(
            msg="isthmus.mesh.bundle works through its action plugin of the same name, which reads the bundle on the "
            "controller. Call it as a task (not with an ad-hoc copy of the module)."
        )
    arch = platform.machine()
    host = platform.node()
    present = bundle.interpreters(module.params["python"])
    chosen = bundle.choose(arch, present, manifest["platforms"])
    if chosen is None:
        module.fail_json(msg=bundle.missing_words(host, arch, present, manifest["platforms"]))
    version, interpreter = chosen
    files = bundle.select(manifest, arch, version)
    digest = bundle.digest(manifest["version"], version, files)
    home = f"{bundle.ROOT}/{manifest['version']}-{digest[:8]}"
    facts = {"digest": digest, "version": manifest["version"], "python": version}

    changes = Changes(module)
    before = bundle.installed()
    complete = before.get("digest") == digest and os.path.realpath(bundle.CURRENT) == home
    if not complete:
        changes.note(bundle.CURRENT, describe(before), describe({"version": manifest["version"], **facts}))
        if not module.check_mode:
            if module.params["_payload"] is None:
                module.exit_json(changed=False, needed=True, files=[item["path"] for item in files], **facts)
            if not finished(home, digest):
                install(module, home, interpreter, files, facts)
            os.makedirs(bundle.ROOT, exist_ok=True)
            switch(home)
            clean(home, before.get("home", ""))
    changes.link(bundle.COMMAND, bundle.CURRENT + "/bin/isthmus")
    module.exit_json(**changes.result(needed=False, **facts))


def describe(installed):
    """One line for the diff."""
    if not installed:
        return ""
    return f"isthmus {installed['version']} for Python {installed['python']}, digest {installed['digest']}"


def finished(home, digest):
    """Whether an earlier run completed this environment and was interrupted before it became the current one."""
    try:
        with open(home + "/bundle.json", encoding="utf-8") as file:
            return json.load(file).get("digest") == digest
    except (FileNotFoundError, ValueError):
        return False


def install(module, home, interpreter, files, facts):
    """Make the environment at `home`; `bundle.json`, written last, says that it is complete."""
    shutil.rmtree(home, ignore_errors=True)
    os.makedirs(bundle.ROOT, mode=0o755, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=module.tmpdir) as payload:
        unpack(module, payload, files)
        run(module, [interpreter, "-m", "venv", "--without-pip", home], "make the virtual environment")
        wheels = sorted(os.path.join(payload, item["path"]) for item in files if item["kind"] == "wheel")
        pips = [wheel for wheel in wheels if os.path.basename(wheel).startswith("pip-")]
        if not pips:
            module.fail_json(msg="The bundle has no pip wheel; make it anew with `make bundle`.")
        os.makedirs(home + "/lib", exist_ok=True)
        for item in files:
            if item["kind"] == "libbpf":
                shutil.copyfile(os.path.join(payload, item["path"]), home + "/lib/libbpf.so.1")
                os.chmod(home + "/lib/libbpf.so.1", 0o755)
        # pip runs from its own wheel: the distribution's ensurepip is often a package of its own.
        others = [wheel for wheel in wheels if wheel not in pips]
        run(
            module,
            [home + "/bin/python", pips[-1] + "/pip", "install", "--no-index", "--no-deps", "--no-cache-dir"]
            + ["--disable-pip-version-check", "--quiet", "--no-warn-script-location", *others],
            "install the bundle's wheels",
        )
        run(
            module,
            [home + "/bin/python", pips[-1] + "/pip", "--disable-pip-version-check", "check"],
            "check that the bundle's wheels are complete",
        )
        run(module, [home + "/bin/python", "-c", "import isthmus_agent, isthmus_mesh, grpc, cryptography"], "import")
    content = json.dumps({**facts, "home": home}, indent=1, sort_keys=True) + "\n"
    temporary = home + "/.bundle.json.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, home + "/bundle.json")


def unpack(module, directory, files):
    """The uploaded archive, each file compared with its sha256 in the manifest."""
    with tarfile.open(module.params["_payload"]) as archive:
        for item in files:
            target = os.path.join(directory, item["path"])
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with archive.extractfile(item["path"]) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy)
            with open(target, "rb") as copy:
                found = hashlib.sha256(copy.read()).hexdigest()
            if found != item["sha256"]:
                module.fail_json(
                    msg=f"{item['path']} of the bundle has sha256 {found}, its manifest says {item['sha256']}. "
                    "Nothing was changed. Make the bundle anew with `make bundle`."
                )


def run(module, command, what):
    code, out, err = module.run_command(command, environ_update={"LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": ""})
    if code != 0:
        module.fail_json(
            msg=f"Could not {what} on {platform.node()}: {(err or out).strip()}. "
            f"What ran before is still current. The command was: {' '.join(command)}"
        )


def switch(home):
    """`current` names the new environment, in one step."""
    temporary = f"{bundle.CURRENT}.{os.getpid()}.new"
    os.symlink(home, temporary)
    os.replace(temporary, bundle.CURRENT)


def clean(home, before):
    """Keep the current environment and the one before it."""
    keep = {home, before, bundle.CURRENT}
    for name in os.listdir(bundle.ROOT):
        path = os.path.join(bundle.ROOT, name)
        if path not in keep:
            if os.path.islink(path):
                os.unlink(path)
            else:
                shutil.rmtree(path)


if __name__ == "__main__":
    main()
