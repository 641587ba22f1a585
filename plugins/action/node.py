# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Controller's side of isthmus.mesh.node: confirm a change over a new connection, or say that the host took it back."""

from __future__ import annotations

import time
import uuid

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.plugins.connection import ConnectionBase
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.generations import (
    CONFIRMED,
    ROLLED_BACK,
    SECONDS,
    WAITING,
    what_failed,
)

# A host that is back may need as long again until it can be entered: restarts, routes, the retries of TCP.
COMING_BACK = 60
PAUSE = 2


class ActionModule(ActionBase):
    """Runs the module once on a converged host; after a change once more for each try to confirm it."""

    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = {**self._task.args, "token": uuid.uuid4().hex}
        lost = None
        try:
            answer = self._module(arguments, task_vars)
        except AnsibleConnectionFailure as exc:
            if self._task.check_mode:
                raise
            lost, answer = exc, {"generation": True}
        answer.pop("invocation", None)
        if not answer.get("failed") and answer.get("generation") is not None:
            timeout = int(arguments.get("timeout", 120)) if lost else 0
            refused = self._confirm(arguments, task_vars, timeout + SECONDS + COMING_BACK, lost)
            if refused is not None:
                answer.pop("generation")
                answer.update(refused, failed=True)
            elif lost is not None:
                # It was confirmed, with nothing known of what it did.
                answer = self._module({**arguments, "token": uuid.uuid4().hex}, task_vars)
                answer["changed"] = True
        result.update(answer)
        return result

    def _confirm(self, arguments, task_vars, seconds, lost):
        """None when the change stays, else what the task ends with."""
        host = task_vars["inventory_hostname"]
        deadline = time.monotonic() + seconds
        problem = stuck = ""
        while True:
            try:
                self._new_connection()
                answer = self._module({**arguments, "confirm": arguments["token"]}, task_vars)
            except AnsibleConnectionFailure as exc:
                answer = {}
                problem = problem or f"no new connection could be made ({str(exc).strip()})"
            if answer.get("failed"):
                return answer
            made = answer.get("made") or {}
            if made.get("state") == CONFIRMED:
                return None
            if made.get("state") == ROLLED_BACK:
                return {"msg": _words(host, made, answer.get("problem") or problem or (lost and str(lost)))}
            if made and made["state"] != WAITING and lost is not None:
                raise lost  # before the module came to its change
            problem = answer.get("problem") or problem
            stuck = _stuck(host, made) or stuck
            if time.monotonic() > deadline and stuck:
                return {"msg": stuck}
            if time.monotonic() > deadline:
                words = (
                    f"{host} could not be asked whether its change stays, for {seconds} s: {problem}. The host takes "
                    f"it back by itself, {SECONDS} s after it was made. Next: when {host} can be entered, look there "
                    "with `isthmus generations`, then run with --check --diff."
                )
                if lost is not None:
                    raise AnsibleConnectionFailure(words) from lost
                return {"msg": words}
            time.sleep(PAUSE)

    def _new_connection(self):
        # Not every kind of connection can be reset, and some would warn at each try.
        if type(self._connection).reset is not ConnectionBase.reset:
            self._connection.reset()
        else:
            self._connection.close()

    def _module(self, arguments, task_vars):
        return self._execute_module(module_name="isthmus.mesh.node", module_args=arguments, task_vars=task_vars)


def _words(host, made, problem):
    failed = what_failed(made["note"])
    return (
        f"{host} took its change back: generation {made['number']} was given up, generation {made['previous']} is "
        f"restored{', but on the way this failed: ' + failed if failed else ''}. Why: it was not confirmed over a new "
        f"connection within {SECONDS} s{': ' + problem if problem else ''}. Other hosts are not concerned. Next: "
        f"`isthmus generations` on {host} shows what differs, --check --diff what the next run would change; correct "
        "the inventory before it."
    )


def _stuck(host, made):
    """Empty while no way back has failed."""
    failed = what_failed(made.get("note", ""))
    return failed and (
        f"{host} could not take its change back: generation {made['number']} was not confirmed, and generation "
        f"{made['previous']} could not be restored. What failed: {failed}. The host tries it again every {SECONDS} s, "
        f"and at a boot. Next: put that right on {host}, where `isthmus generations` shows what differs still; then "
        "correct the inventory, and run with --check --diff."
    )
