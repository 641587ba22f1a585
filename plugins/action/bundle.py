# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Controller's side of isthmus.mesh.bundle: read the manifest, ask the host, upload only when something differs."""

from __future__ import annotations

import os

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.isthmus.mesh.plugins.plugin_utils.bundles import MAKE, platforms


class ActionModule(ActionBase):
    """Runs the module once on a converged host, twice when it has to install."""

    _requires_connection = True
    _VALID_ARGS = frozenset(("paths", "python"))

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        directories = arguments.get("paths")
        if not isinstance(directories, list) or not directories:
            raise AnsibleActionFail("isthmus.mesh.bundle needs 'paths', a list of directories with bundle.json.")
        offered = platforms(directories)
        arguments["platforms"] = [{key: item[key] for key in item if key != "place"} for item in offered]
        answer = self._module(arguments, task_vars)
        archive = answer.pop("needed", None)
        if archive is not None:
            place = [item["place"] for item in offered if item["archive"] == archive][-1]
            if not os.path.exists(place):
                raise AnsibleActionFail(f"The bundle's archive {place} does not exist; its manifest names it. {MAKE}")
            directory = self._make_tmp_path()
            remote = self._connection._shell.join_path(directory, "bundle.tar.gz")
            try:
                self._transfer_file(place, remote)
                self._fixup_perms2((directory, remote))
                answer = self._module({**arguments, "archive": remote}, task_vars)
            finally:
                self._remove_tmp_path(directory)
            answer.pop("needed", None)
        answer.pop("invocation", None)
        result.update(answer)
        return result

    def _module(self, arguments, task_vars):
        return self._execute_module(module_name="isthmus.mesh.bundle", module_args=arguments, task_vars=task_vars)
