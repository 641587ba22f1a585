# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which run of ansible-playbook this is, and who started it. Private to this collection."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import multiprocessing
import os
import platform


def operator(variables):
    """Who runs this: AWX's user, else the controller's."""
    for name in ("awx_user_name", "tower_user_name"):
        if variables.get(name):
            return str(variables[name])
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # an execution environment may run under a user id without a name
        return f"uid {os.getuid()}"


def this_run(variables):
    """`by` and `where` for people; `process`, the same string in every task of this run and in no other run's.

    An action is run by a worker; its parent is ansible-playbook itself, or was: a worker may outlive it.
    """
    job = variables.get("awx_job_id") or variables.get("tower_job_id")
    parent = multiprocessing.parent_process()
    pid = os.getppid() if parent is None else parent.pid
    return {
        "by": operator(variables),
        "where": f"AWX job {job}" if job else platform.node(),
        "process": f"{_machine()}/{pid}/{_started(pid)}",
    }


def has_ended(process):
    """Whether the run with this `process` is one of this controller and does not run any more."""
    machine, _slash, rest = process.partition("/")
    pid, _slash, started = rest.partition("/")
    if machine != _machine() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's, but alive
    return _started(int(pid)) != started


def _machine():
    """This boot of this machine, and within it these process numbers: containers have their own."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):  # Linux has both
        parts.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts.append(file.read().strip())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _started(pid):
    """When it was started, in the kernel's ticks (proc(5)); empty where there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""
