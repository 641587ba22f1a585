# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Controller's side of isthmus.mesh.bundle: read the manifest, ask the host, upload only when something differs."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile

from ansible import constants as C
from ansible.errors import AnsibleActionFail
from ansible.module_utils.urls import open_url
from ansible.plugins.action import ActionBase

MAKE = "Make it with: make bundle"


class ActionModule(ActionBase):
    """Runs the module once on a converged host, twice when it has to install."""

    _requires_connection = True
    _VALID_ARGS = frozenset(("path", "wheelhouse", "wheelhouse_sha256", "python"))

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        if not arguments.get("path"):
            raise AnsibleActionFail("isthmus.mesh.bundle needs 'path', the directory with bundle.json.")
        with tempfile.TemporaryDirectory(dir=C.DEFAULT_LOCAL_TMP) as scratch:
            places, manifest = self._manifest(arguments, scratch)
            arguments["_manifest"] = manifest
            answer = self._module(arguments, task_vars)
            if not answer.get("failed") and answer.pop("needed", False):
                remote = self._upload(answer["files"], places, scratch)
                try:
                    answer = self._module({**arguments, "_payload": remote}, task_vars)
                    answer.pop("needed", None)
                finally:
                    self._remove_tmp_path(self._connection._shell.tmpdir)
        answer.pop("invocation", None)
        result.update(answer)
        return result

    def _module(self, arguments, task_vars):
        return self._execute_module(
            module_name="isthmus.mesh.bundle", module_args=arguments, task_vars=task_vars, wrap_async=False
        )

    def _manifest(self, arguments, scratch):
        """Place on the controller of every file, by its path in the manifest, and the merged manifest."""
        directories = [arguments["path"]]
        if arguments.get("wheelhouse"):
            directories.append(self._wheelhouse(arguments, scratch))
        places: dict[str, str] = {}
        merged: dict = {}
        for directory in directories:
            name = os.path.join(directory, "bundle.json")
            try:
                with open(name, encoding="utf-8") as file:
                    manifest = json.load(file)
            except FileNotFoundError as exc:
                raise AnsibleActionFail(
                    f"There is no agent bundle: {name} does not exist on the controller. {MAKE} "
                    "(in the collection's sources), or install the built collection, which carries it."
                ) from exc
            except ValueError as exc:
                raise AnsibleActionFail(f"{name} is not JSON: {exc}. {MAKE}") from exc
            if manifest.get("schema") != 1:
                raise AnsibleActionFail(f"{name} has schema {manifest.get('schema')!r}, this collection reads 1. {MAKE}")
            merged.setdefault("version", manifest["version"])
            merged.setdefault("platforms", []).extend(manifest["platforms"])
            merged.setdefault("files", []).extend(manifest["files"])
            for item in manifest["files"]:
                places[item["path"]] = os.path.join(directory, item["path"])
        return places, merged

    def _wheelhouse(self, arguments, scratch):
        source = arguments["wheelhouse"]
        if "://" not in source:
            return source
        wanted = arguments.get("wheelhouse_sha256")
        if not wanted:
            raise AnsibleActionFail(f"The wheelhouse {source} is a URL; name its sha256 in isthmus_bundle_wheelhouse_sha256.")
        archive = os.path.join(scratch, "wheelhouse.tar")
        digest = hashlib.sha256()
        with open_url(source, timeout=60) as response, open(archive, "wb") as file:
            while True:
                chunk = response.read(1 << 20)
                if not chunk:
                    break
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != wanted.lower():
            raise AnsibleActionFail(
                f"The wheelhouse {source} has sha256 {digest.hexdigest()}, declared is {wanted}. Nothing was changed."
            )
        directory = os.path.join(scratch, "wheelhouse")
        with tarfile.open(archive) as content:
            content.extractall(directory, filter="data")
        return directory

    def _upload(self, files, places, scratch):
        archive = os.path.join(scratch, "bundle.tar")
        with tarfile.open(archive, "w") as content:
            for name in files:
                try:
                    content.add(places[name], arcname=name)
                except FileNotFoundError as exc:
                    raise AnsibleActionFail(f"The bundle lacks {name}, which its manifest lists. {MAKE}") from exc
        directory = self._make_tmp_path()
        remote = self._connection._shell.join_path(directory, "bundle.tar")
        self._transfer_file(archive, remote)
        self._fixup_perms2((directory, remote))
        return remote
