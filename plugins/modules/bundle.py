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
  - A host that carries a newer version keeps it, and the module fails; a downgrade is never made.
  - An interrupted installation is never used and is made anew by the next run, and so is one of which a file is missing
    or is not as it was installed. The environment before it stays, for a way back; older ones are removed.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  paths:
    description:
      - Directories on the controller with a C(bundle.json) and the archives it names. Those that do not exist are
        passed over; of two archives for one platform the last is used. All are of the collection's version.
    type: list
    elements: path
    required: true
  python:
    description:
      - Interpreter for the environment, instead of the newest one found that the bundle fits.
    type: path
  platforms:
    description:
      - What the manifests offer. The action plugin fills it in; a playbook cannot set it.
    type: list
    elements: dict
  archive:
    description:
      - Place of the uploaded archive on the host. The action plugin fills it in; a playbook cannot set it.
    type: path
seealso:
  - module: isthmus.mesh.node
"""

EXAMPLES = r"""
- name: The agent's software is on the host
  isthmus.mesh.bundle:
    paths:
      - "{{ role_path }}/files"
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

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tarfile
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import bundle
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

PATIENCE = 300  # seconds; an installation takes 5 to 60
FILES = "files.json"  # of an environment: SHA-256 of its files by path, as they were installed


def main():
    module = AnsibleModule(
        argument_spec={
            "paths": {"type": "list", "elements": "path", "required": True},
            "python": {"type": "path"},
            "platforms": {"type": "list", "elements": "dict"},
            "archive": {"type": "path"},
        },
        supports_check_mode=True,
    )
    platforms = module.params["platforms"]
    if platforms is None:
        module.fail_json(
            msg="isthmus.mesh.bundle works through its action plugin of the same name, which reads the bundle on the "
            "controller. Call it as a task of a playbook."
        )
    arch, host = platform.machine(), platform.node()
    present = bundle.interpreters(module.params["python"])
    chosen = bundle.choose(arch, present, platforms)
    if chosen is None:
        module.fail_json(msg=bundle.missing_words(host, arch, present, platforms))
    version, interpreter = chosen
    offered = [item for item in platforms if item["arch"] == arch and item["python"] == version][-1]
    digest = offered["digest"]
    # Of the digest as well: a changed bundle of the same version never touches the environment that is running.
    home = f"{bundle.ROOT}/{offered['version']}-{digest[:8]}"
    refusal = bundle.downgrade_words(host, offered["version"])
    if refusal:
        module.fail_json(msg=f"{refusal} Nothing was changed on {host}.")
    facts = {"digest": digest, "version": offered["version"], "python": version}

    changes = Changes(module)
    before = bundle.installed()
    current = os.readlink(bundle.CURRENT) if os.path.islink(bundle.CURRENT) else ""
    found = damage(home, digest)
    if current != home or found:
        told = f"{home}: {found}" if current == home else describe(before)
        changes.note(bundle.CURRENT, told, describe(facts))
        if not module.check_mode:
            if found:
                if module.params["archive"] is None:
                    module.exit_json(changed=False, needed=offered["archive"], **facts)
                with alone(module):
                    if damage(home, digest):
                        install(module, home, interpreter, offered["sha256"])
            if current != home:
                switch(home)
                clean(home, current)
    changes.link(bundle.COMMAND, bundle.CURRENT + "/bin/isthmus")
    module.exit_json(**changes.result(needed=None, **facts))


def describe(installed):
    """One line for the diff."""
    if not installed:
        return ""
    return f"isthmus {installed['version']} for Python {installed['python']}, digest {installed['digest']}"


def damage(home, digest):
    """What keeps an environment from being used, in words; empty when it is whole."""
    try:
        with open(home + "/bundle.json", encoding="utf-8") as about, open(f"{home}/{FILES}", encoding="utf-8") as sums:
            if json.load(about)["digest"] != digest:
                return "it is another bundle's"
            wanted = json.load(sums)
        for path, sha256 in wanted.items():
            if sha256_of(os.path.join(home, path)) != sha256:
                return f"{path} is not as it was installed"
        os.stat(home + "/bin/python")  # a link to the host's
    except FileNotFoundError as exc:
        return f"{os.path.relpath(exc.filename, home)} is missing"
    except (OSError, ValueError, KeyError) as exc:
        return f"it cannot be read ({exc})"
    return ""


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@contextlib.contextmanager
def alone(module):
    """While no other installation goes on: that of a run whose controller died goes on by itself on the host."""
    os.makedirs(bundle.ROOT, mode=0o755, exist_ok=True)
    directory = os.open(bundle.ROOT, os.O_RDONLY)
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    module.fail_json(
                        msg=f"Another process has been installing a bundle in {bundle.ROOT} of {platform.node()} for "
                        f"{PATIENCE} s: of another run, or of one that died. Nothing was changed. Next: look there for "
                        "a compileall that does not end (`ps -ef`), end it, and run again."
                    )
                time.sleep(0.2)
        yield
    finally:
        os.close(directory)


def install(module, home, interpreter, sha256):
    """Make the environment beside `home`, and put it there when it is complete."""
    found = sha256_of(module.params["archive"])
    if found != sha256:
        module.fail_json(
            msg=f"The bundle's archive has sha256 {found}, its manifest says {sha256}. Nothing was changed. "
            "Make the bundle anew with `make bundle`."
        )
    place, old = home + ".new", home + ".old"
    for path in (place, old):
        shutil.rmtree(path, ignore_errors=True)
    run(module, [interpreter, "-m", "venv", "--without-pip", place], "make the virtual environment")
    for name in os.listdir(place + "/bin"):
        if name.lower().startswith("activate"):  # they say where it was made, and nobody needs them
            os.unlink(f"{place}/bin/{name}")
    with tarfile.open(module.params["archive"]) as archive:
        for member in archive:
            archive.extract(member, place)  # its sha256 is the manifest's
    python = place + "/bin/python"
    # Of a bundle that was made with another Python nothing is compiled, and an agent may not write there.
    run(module, [python, "-m", "compileall", "-q", "-s", place, "-p", home, place + "/lib"], "compile it")
    run(module, [python, "-c", "import isthmus_agent, isthmus_mesh, grpc, cryptography"], "import it")
    paths = [os.path.join(top, name) for top, _directories, names in os.walk(place) for name in names]
    sums = {os.path.relpath(path, place): sha256_of(path) for path in sorted(paths) if not os.path.islink(path)}
    with open(f"{place}/{FILES}", "w", encoding="utf-8") as file:
        json.dump(sums, file, indent=0)
    os.sync()
    if os.path.lexists(home):  # half of one, or damaged: programs that run from it have what they opened
        os.rename(home, old)
    os.rename(place, home)
    shutil.rmtree(old, ignore_errors=True)


def run(module, command, what):
    code, out, err = module.run_command(command, environ_update={"LC_ALL": "C.UTF-8"})
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
    """Keep the current environment and the one before it, and the programs that etcd runs from."""
    keep = {home, before, bundle.CURRENT, bundle.ETCD}
    for name in os.listdir(bundle.ROOT):
        path = os.path.join(bundle.ROOT, name)
        if path not in keep:
            if os.path.islink(path):
                os.unlink(path)
            else:
                shutil.rmtree(path)


if __name__ == "__main__":
    main()
