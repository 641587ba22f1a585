# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Controller's side of isthmus.mesh.kubernetes_install: tells how far a roll-out is while it goes on."""

from __future__ import annotations

import time

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

PATIENCE = 15
"""Seconds after which the operator is told again."""


class ActionModule(ActionBase):
    """Runs the module until everything is rolled out; once where nothing is."""

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = {"patience": PATIENCE, **self._task.args}
        changed, diff, said, since = False, [], "", time.monotonic()
        while True:
            waited = int(time.monotonic() - since) if said else 0
            answer = self._execute_module(
                module_name="isthmus.mesh.kubernetes_install",
                module_args={**arguments, "waited": waited},
                task_vars=task_vars,
            )
            changed, diff = changed or answer.get("changed", False), diff + answer.get("diff", [])
            unfinished = answer.get("unfinished")
            if answer.get("failed") or not unfinished or not arguments["patience"]:
                break
            if unfinished != said:
                said, since = unfinished, time.monotonic()
                Display().display(f"  {unfinished}")
        result.update(answer, changed=changed, diff=diff)
        return result
