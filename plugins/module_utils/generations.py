# SPDX-License-Identifier: BSD-2-Clause
"""A change of the host as a numbered generation that a timer on the host takes back unless it is confirmed.

The format is that of ``mesh/generations.py``; ``isthmus rollback`` restores, with no controller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import stat
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import bundle
from ansible_collections.isthmus.mesh.plugins.module_utils.files import atomic_write, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import generations as fmt
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.generations import Entry, Generation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ansible.module_utils.basic import AnsibleModule

DIRECTORY = fmt.DIRECTORY
# A way back that fails, as on a full disk, is gone again and again until what was not restored is.
AGAIN = ("Restart=on-failure", f"RestartSec={fmt.SECONDS}s")


def entry_of(path: str, restarts: tuple[str, ...] = (), mark: str = "") -> tuple[Entry, bytes | None]:
    """What is at ``path`` now, and its content when it is a file."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return Entry(restarts=restarts, mark=mark), None
    if stat.S_ISLNK(found.st_mode):
        return Entry(link=os.readlink(path), restarts=restarts, mark=mark), None
    content = read_bytes(path) or b""
    digest, mode = hashlib.sha256(content).hexdigest(), stat.S_IMODE(found.st_mode)
    marked = bool(mark) and mark.encode() in content
    return Entry(None, digest, mode, found.st_uid, found.st_gid, restarts, mark, marked), content


class Generations:
    """The generations of this host. ``parts`` are the paths that make one: units to restart and mark, by path."""

    def __init__(self, module: AnsibleModule, parts: Mapping[str, tuple[tuple[str, ...], str]]) -> None:
        self.module = module
        self.parts = parts

    def waiting(self) -> Generation | None:
        """The one that is not confirmed yet, of an interrupted run or of this one."""
        return next((one for one in self._all().values() if one.state == fmt.WAITING), None)

    def begin(self, spec: str, token: str, root_answered: bool, seconds: int) -> int:
        """Keep what is there, and set the timer to ``seconds``; returns the number of what is made from now on.

        Nothing is changed on the host before this returns. What another run left unconfirmed becomes this one: the way
        back leads past it.
        """
        os.makedirs(DIRECTORY, mode=0o755, exist_ok=True)
        with self._locked():
            known = self._all()
            waiting = next((one for one in known.values() if one.state == fmt.WAITING), None)
            if waiting is not None:
                number, previous = waiting.number, waiting.previous
                root_answered = waiting.root_answered
            else:
                previous = self._keep_present(known)
                number = max([*known, previous]) + 1
            new = Generation(number, _now(), spec, fmt.WAITING, previous, token, "", root_answered, None)
            self._write(new)
            self._arm(new, seconds)
            self._set_current(number)
        return number

    def finish(self, number: int) -> None:
        """The change is complete: keep it, and give it the time in which it must be confirmed."""
        with self._locked():
            made = self._all()[number]
            if made.state != fmt.WAITING or made.note:  # the way back has begun
                self.module.fail_json(msg=f"Generation {number} took too long: {made.note}. Run the playbook again.")
            self._write(dataclasses.replace(made, files=self._capture(number)))
            self._arm(made, fmt.SECONDS)

    def give_up(self, number: int) -> None:
        """It cannot be completed: the host goes back after the time in which it would have been confirmed."""
        with self._locked():
            self._arm(self._all()[number], fmt.SECONDS)

    def made_by(self, token: str) -> Generation | None:
        return next((one for one in self._all().values() if one.token == token), None)

    def confirm(self, number: int) -> Generation:
        """It stays. Returns what became of it: it may have been taken back a moment ago."""
        with self._locked():
            known = self._all()
            found = known[number]
            if found.state == fmt.WAITING:
                found = dataclasses.replace(found, state=fmt.CONFIRMED)
                self._write(found)
                self._disarm()
                for path in (fmt.BOOT_WANTED, fmt.BOOT):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(path)
                for old in fmt.doomed(known, (number, found.previous)):
                    shutil.rmtree(os.path.join(DIRECTORY, str(old)))
        return found

    def _keep_present(self, known: Mapping[int, Generation]) -> int:
        """The number of what is on the host now; a new one when that is no generation as it was made."""
        current = self._current()
        if current in known and not self._edited(known[current]):
            return current
        number = max(known) + 1 if known else 0
        note = "changed by hand" if known else "before the first"
        os.makedirs(os.path.join(DIRECTORY, str(number)), exist_ok=True)
        spec = ""
        with contextlib.suppress(OSError, ValueError), open(fmt.SPEC, encoding="utf-8") as file:
            spec = str(json.load(file).get("hash", ""))
        files = self._capture(number)
        self._write(Generation(number, _now(), spec, fmt.CONFIRMED, None, "", note, False, files))
        self._set_current(number)
        return number

    def _edited(self, current: Generation) -> bool:
        # The bundle's link was moved by the bundle's own module, earlier in this run: the way back is to the old one.
        kept = {path: entry for path, entry in (current.files or {}).items() if path != bundle.CURRENT}
        return not kept or any(not entry.same(entry_of(path, mark=entry.mark)[0]) for path, entry in kept.items())

    def _capture(self, number: int) -> dict[str, Entry]:
        files = {}
        for path, (restarts, mark) in self.parts.items():
            files[path], content = entry_of(path, restarts, mark)
            if content is not None:
                name = os.path.join(DIRECTORY, str(number), str(files[path].sha256))
                atomic_write(name, content, 0o644, os.geteuid(), os.getegid())
        return files

    def _write(self, one: Generation) -> None:
        place = os.path.join(DIRECTORY, str(one.number))
        os.makedirs(place, mode=0o755, exist_ok=True)
        text = json.dumps(one.to_dict(), indent=1, sort_keys=True) + "\n"
        atomic_write(os.path.join(place, "manifest.json"), text.encode(), 0o644, os.geteuid(), os.getegid())

    def _all(self) -> dict[int, Generation]:
        found = {}
        for name in os.listdir(DIRECTORY) if os.path.isdir(DIRECTORY) else ():
            content = read_bytes(os.path.join(DIRECTORY, name, "manifest.json")) if name.isdigit() else None
            if content is not None:
                with contextlib.suppress(ValueError):
                    found[int(name)] = Generation.from_dict(json.loads(content))
        return dict(sorted(found.items()))

    def _current(self) -> int:
        try:
            return int(os.readlink(os.path.join(DIRECTORY, "current")))
        except (FileNotFoundError, ValueError):
            return -1

    def _set_current(self, number: int) -> None:
        temporary = os.path.join(DIRECTORY, f".current.{os.getpid()}")
        os.symlink(str(number), temporary)
        os.replace(temporary, os.path.join(DIRECTORY, "current"))

    def _arm(self, one: Generation, seconds: int) -> None:
        # By the directory of a bundle, not by `current`, which is one of the things that go back.
        kept = (self._all()[one.previous].files or {}).get(bundle.CURRENT) if one.previous is not None else None
        places = [kept.link if kept else None, os.path.realpath(bundle.CURRENT)]
        programs = [os.path.join(place, "bin", "isthmus") for place in places if place]
        program = next((path for path in programs if os.access(path, os.X_OK)), None)
        if program is None:
            self.module.fail_json(
                msg=f"There is no {bundle.CURRENT}/bin/isthmus on this host, which takes a change back when it cuts "
                "the host off. Nothing was changed. Run the role isthmus.mesh.bundle first."
            )
        self._disarm()
        back = (str(program), "rollback", str(one.previous), "--unless-confirmed", str(one.number))
        self._arm_boot(one, back)
        command = [
            *("systemd-run", "--quiet", "--collect", f"--unit={fmt.UNIT}", f"--on-active={seconds}s"),
            *("--timer-property=AccuracySec=1s", f"--description=Isthmus: back to generation {one.previous}"),
            *(f"--property={setting}" for setting in AGAIN),
            *back,
        ]
        code, out, err = self.module.run_command(command)
        if code != 0:
            self.module.fail_json(
                msg=f"The timer that takes a change back could not be set: {(err or out).strip()}. Nothing more was "
                "changed. Run the playbook again when that is solved."
            )

    def _arm_boot(self, one: Generation, back: tuple[str, ...]) -> None:
        text = (
            f"[Unit]\nDescription=Isthmus: back to generation {one.previous} at a boot before {one.number} is confirmed"
            f"\n\n[Service]\nType=oneshot\nExecStart={' '.join(back)}\n" + "\n".join(AGAIN) + "\n\n"
            "[Install]\nWantedBy=multi-user.target\n"
        )
        atomic_write(fmt.BOOT, text.encode(), 0o644, os.geteuid(), os.getegid())
        with contextlib.suppress(FileExistsError):
            os.makedirs(os.path.dirname(fmt.BOOT_WANTED), exist_ok=True)
            os.symlink(fmt.BOOT, fmt.BOOT_WANTED)

    def _disarm(self) -> None:
        # With the lock held the service restores nothing: it waits for the lock, or is at its end and still has the
        # name. Where there is no such unit, systemd calls that a failure.
        for name in (f"{fmt.UNIT}.timer", f"{fmt.UNIT}.service", os.path.basename(fmt.BOOT)):
            self.module.run_command(["systemctl", "stop", name])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(os.path.join(DIRECTORY, "lock"), "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def described(one: Generation | None) -> dict[str, Any]:
    """What the controller is told of a generation."""
    if one is None:
        return {"state": "unknown"}
    return {"number": one.number, "state": one.state, "previous": one.previous, "note": one.note}
