# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Controller's side of isthmus.mesh.estate_record: which run asks, of which version, and which of its own ended."""

from __future__ import annotations

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.isthmus.mesh.plugins.plugin_utils.bundles import collection_version
from ansible_collections.isthmus.mesh.plugins.plugin_utils.runs import has_ended, this_run


class ActionModule(ActionBase):
    """Runs the module once, and again when the lock is a dead run's of this controller."""

    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = {**self._task.args, "run": this_run(task_vars), "version": collection_version()}
        if has_ended(arguments["run"]["process"]):
            # Nobody would give back the lock that it takes.
            raise AnsibleActionFail("ansible-playbook, whose task this is, was ended")
        try:
            answer = self._module(arguments, task_vars)
            locked_by = answer.get("locked_by") or {}
            if has_ended(locked_by.get("process", "")):
                answer = self._module({**arguments, "break_lock": locked_by["name"]}, task_vars)
        except AnsibleConnectionFailure as exc:
            # For a task that runs once Ansible ends the play of all hosts, also when `ignore_unreachable` is set.
            words = f"An etcd host of cluster {arguments.get('cluster')} cannot be entered: {str(exc).strip()}"
            answer = {"changed": False, "locked": False, "silent": words, "warnings": [words]}
        answer.pop("invocation", None)
        result.update(answer)
        return result

    def _module(self, arguments, task_vars):
        return self._execute_module(
            module_name="isthmus.mesh.estate_record", module_args=arguments, task_vars=task_vars
        )
