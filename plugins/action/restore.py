# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Controller's side of isthmus.mesh.restore: reads the backup, opens the authority's key and hands it over."""

from __future__ import annotations

import json
import os
import shlex

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.isthmus.mesh.plugins.plugin_utils import backups


class ActionModule(ActionBase):
    """One method for each part; all but the first run the module on the host."""

    _VALID_ARGS = frozenset(
        (
            *("part", "cluster", "estate", "backup_directory", "time", "only"),
            *("path", "key", "known_ca", "authority", "replace", "directory"),
        )
    )

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = {name: value for name, value in self._task.args.items() if value is not None}
        parts = {"backup": self._backup, "look": self._look, "authority": self._authority}
        try:
            result.update(parts.get(arguments.get("part"), self._module)(arguments, task_vars))
        except backups.RefusedError as exc:
            result.update(failed=True, msg=str(exc))
        return result

    def _backup(self, arguments, task_vars):
        """Which backup, and that it is whole."""
        cluster, estate = str(arguments.get("cluster") or ""), arguments.get("estate") or {}
        clusters = sorted(name for name, one in estate.get("clusters", {}).items() if one.get("state") != "absent")
        if cluster not in clusters:
            raise backups.RefusedError(
                f"isthmus_restore: {cluster or 'it is not given'}: which cluster to restore. Nothing was changed on "
                f"any host. Next: run again with -e isthmus_restore=CLUSTER, one of {', '.join(clusters)}"
            )
        if arguments.get("only") not in (None, "", "authority"):
            raise backups.RefusedError(
                f"isthmus_restore_only: {arguments['only']}: nothing but authority can be restored by itself. Nothing "
                "was changed on any host. Next: leave it out, or -e isthmus_restore_only=authority"
            )
        if not arguments.get("backup_directory"):
            raise backups.RefusedError(
                "isthmus_backup_dir is not given: where backups are kept on the controller. Nothing was changed on any "
                "host. Next: run again with -e isthmus_backup_dir=DIRECTORY"
            )
        path = backups.choose(_place(arguments["backup_directory"]), cluster, str(arguments.get("time") or ""))
        manifest = backups.whole(path, cluster, str(estate.get("name")))
        try:
            with open(os.path.join(path, backups.RECORD), encoding="utf-8") as file:
                documents = json.load(file)
        except (OSError, ValueError) as exc:
            raise backups.RefusedError(f"{backups.RECORD} of the backup {path} cannot be read: {exc}") from exc
        return {
            "changed": False,
            "path": path,
            "snapshot": os.path.join(path, backups.SNAPSHOT),
            "taken": manifest["time"],
            "revision": manifest["etcd"]["revision"],
            "record": {"cluster": None, "documents": documents},
        }

    def _look(self, arguments, task_vars):
        """Refuses before anything is changed what could not be done after."""
        answer = self._module(arguments, task_vars)
        if not answer.get("failed") and answer["authority_lost"]:
            self._opened(arguments)
        return answer

    def _authority(self, arguments, task_vars):
        """Puts the key back. Not as an argument of the module: that is a file on the host while it runs."""
        secret = self._opened(arguments)
        given = {"certificate": backups.CERTIFICATE, "ledger": backups.LEDGER}
        for option, name in given.items():
            path = os.path.join(_place(arguments["path"]), name)
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    arguments[option] = file.read()
        answer = self._module(arguments, task_vars)
        if answer.get("failed") or self._task.check_mode:
            return answer
        if not self._connection.has_pipelining:
            raise AnsibleActionFail(
                f"The connection {self._connection.transport} to this host cannot hand over a key on its input. "
                "ca.key was not put back. Next: use ssh, or put it back by hand (`openssl cms -decrypt`)"
            )
        key = os.path.join(answer["directory"], "ca.key")
        command = _TAKE_IN.format(new=shlex.quote(key + ".new"), key=shlex.quote(key), size=len(secret))
        done = self._low_level_execute_command(f"/bin/sh -c {shlex.quote(command)}", in_data=secret)
        if done["rc"] != 0:
            raise AnsibleActionFail(
                f"{key} was not put back on this host: {(done['stderr'] or done['stdout']).strip()[-300:]}. Next: run "
                "again"
            )
        return answer

    def _opened(self, arguments):
        return backups.opened_authority(
            _place(arguments["path"]),
            arguments["cluster"],
            _place(arguments["key"]) if arguments.get("key") else "",
            arguments.get("known_ca"),
        )

    def _module(self, arguments, task_vars):
        given = {name: value for name, value in arguments.items() if name not in ("key", "known_ca")}
        answer = self._execute_module(module_name="isthmus.mesh.restore", module_args=given, task_vars=task_vars)
        answer.pop("invocation", None)
        return answer


# All of it arrived, or none of it is there.
_TAKE_IN = (
    "umask 077; trap 'rm -f {new}' EXIT; cat > {new} && "
    'test "$(wc -c < {new})" -eq {size} && sync {new} && mv {new} {key}'
)


def _place(path):
    """On the controller, from where the run was started."""
    return os.path.abspath(os.path.expanduser(str(path)))
