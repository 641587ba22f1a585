# SPDX-License-Identifier: GPL-3.0-or-later
"""What the programs that stand for systemd in a test have in common: which unit runs, is enabled, and was asked for.

Found beside them, they are run as scripts.
"""

from pathlib import Path


class FakeUnits:
    """Units are files in `units`; numbers of processes in `pids`, what is enabled in `enabled`, calls in `calls`.

    `start` and `stop` are the test's own; verbs in `silent` are not written down.
    """

    def __init__(self, units, pids, enabled, calls, silent):
        self.units, self.pids, self.enabled, self.calls, self.silent = units, pids, enabled, calls, silent

    def pid(self, name):
        try:
            number = int((self.pids / name).read_text())
            running = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (OSError, ValueError):
            return 0
        return number if running else 0

    def show(self, name):
        state, there = "active" if self.pid(name) else "inactive", (self.units / name).exists()
        enabled = (self.enabled / name).exists()
        print(
            f"Id={name}\nLoadState={'loaded' if there else 'not-found'}\nActiveState={state}\nMainPID={self.pid(name)}"
        )
        print(f"UnitFileState={'' if not there else 'enabled' if enabled else 'disabled'}\nNeedDaemonReload=no")
        print("ExecMainStartTimestampMonotonic=0\n")

    def systemctl(self, words, start, stop):
        self.pids.mkdir(exist_ok=True)
        self.enabled.mkdir(parents=True, exist_ok=True)
        verb, *names = [word for word in words if not word.startswith("-")]
        if verb not in self.silent:
            with self.calls.open("a") as file:
                file.write(" ".join([verb, *names]) + "\n")
        for name in names:
            if verb == "show":
                self.show(name)
            elif verb == "restart":
                start(name)
            elif verb == "enable":
                (self.enabled / name).touch()
            elif verb in ("stop", "disable"):
                stop(name)
                if verb == "disable":
                    (self.enabled / name).unlink(missing_ok=True)
            else:
                print("disabled" if verb == "is-enabled" else "inactive")
