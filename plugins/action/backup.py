# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Controller's side of isthmus.mesh.backup: reads the public key, fetches what the host made, keeps it."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.isthmus.mesh.plugins.plugin_utils import backups


class ActionModule(ActionBase):
    """Runs the module once, and fetches every file that it made."""

    _requires_connection = True
    _VALID_ARGS = frozenset(("cluster", "part", "backup_directory", "path", "key", "directory"))

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = {name: value for name, value in self._task.args.items() if value is not None}
        part = self._authority if arguments.get("part") == "authority" else self._etcd
        try:
            if arguments.get("key"):
                arguments["recipient"] = backups.recipient(_place(arguments["key"]))
            result.update(part(arguments, task_vars))
        except backups.RefusedError as exc:
            result.update(failed=True, refused=True, msg=str(exc))
        return result

    def _etcd(self, arguments, task_vars):
        """A new directory with snapshot and record."""
        if not arguments.get("backup_directory"):
            raise backups.RefusedError(
                "isthmus_backup_dir is not given: where backups are kept on the controller. Next: run again with "
                "-e isthmus_backup_dir=DIRECTORY"
            )
        directory = os.path.join(_place(arguments["backup_directory"]), str(arguments.get("cluster")))
        backups.refuse_unwritable(directory)
        now = datetime.datetime.now(datetime.timezone.utc)
        with self._on_the_host(arguments, task_vars) as (into, answer):
            if answer.get("failed"):
                return answer
            about = answer["about"]
            told = {"ca_host": about["ca_host"], "revision": about["etcd"]["revision"]}
            if into is None:
                return {**_done(answer, directory, ["estate.json", "snapshot.db"]), **told}
            with backups.making(directory, f"{now:%Y%m%dT%H%M%SZ}") as (making, path):
                self._fetch(answer["digests"], into, making)
                manifest = {
                    "schema": 1,
                    "cluster": arguments["cluster"],
                    "estate": about["estate"],
                    "time": f"{now:%Y-%m-%dT%H:%M:%SZ}",
                    "host": self._task.delegate_to or task_vars["inventory_hostname"],
                    "isthmus": answer["version"],
                    "etcd": about["etcd"],
                    "authority": {"host": about["ca_host"], "fingerprint": None, "key": False, "ledger": False},
                    "files": answer["digests"],
                }
                backups.write_manifest(making, manifest)
        return {**_done(answer, path, answer["digests"]), **told}

    def _authority(self, arguments, task_vars):
        """Certificate and encrypted key beside the snapshot."""
        path = _place(arguments.get("path") or "")
        with self._on_the_host(arguments, task_vars) as (into, answer):
            if answer.get("failed"):
                return answer
            if into is None:
                about = answer["about"]
                files = {backups.CERTIFICATE: True, backups.LEDGER: about["ledger"], backups.SEALED_KEY: about["key"]}
                return _done(answer, path, [name for name, there in files.items() if there])
            try:
                manifest = backups.read_manifest(path)
                with tempfile.TemporaryDirectory(prefix=".making-", dir=path) as making:
                    self._fetch(answer["digests"], into, making)
                    for name in answer["digests"]:
                        os.replace(os.path.join(making, name), os.path.join(path, name))
                manifest["authority"].update(answer["about"])
                manifest["files"].update(answer["digests"])
                backups.write_manifest(path, manifest)
            except (OSError, ValueError) as exc:
                raise AnsibleActionFail(
                    f"The authority cannot be added to the backup {path} on the controller: {exc}. Next: run again"
                ) from exc
        return _done(answer, path, answer["digests"])

    @contextlib.contextmanager
    def _on_the_host(self, arguments, task_vars):
        """The host's directory with the files, as long as the block lasts (None in check mode), and the answer."""
        temporary = None if self._task.check_mode else self._make_tmp_path()
        into = None if temporary is None else self._connection._shell.join_path(temporary, "backup")
        try:
            answer = self._execute_module(
                module_name="isthmus.mesh.backup",
                module_args=arguments if into is None else {**arguments, "into": into},
                task_vars=task_vars,
            )
            answer.pop("invocation", None)
            yield into, answer
        finally:
            if temporary is not None:
                self._remove_tmp_path(temporary)

    def _fetch(self, digests, source, place):
        for name, expected in digests.items():
            path = os.path.join(place, name)
            self._connection.fetch_file(self._connection._shell.join_path(source, name), path)
            backups.take_in(path, expected)


def _place(path):
    """On the controller, from where the run was started."""
    return os.path.abspath(os.path.expanduser(str(path)))


def _done(answer, path, files):
    told = {name: answer[name] for name in ("warnings", "deprecations") if name in answer}
    names = sorted(files)
    diff = {"before_header": path, "after_header": path, "before": "", "after": "".join(f"{name}\n" for name in names)}
    return {**told, "changed": True, "path": path, "files": names, "diff": diff}
