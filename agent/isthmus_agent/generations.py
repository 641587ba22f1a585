# SPDX-License-Identifier: GPL-3.0-or-later
"""Going back to an earlier generation of this host, with no controller, no etcd and no agent.

The format is that of `isthmus_mesh.generations`; the module isthmus.mesh.node writes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from isthmus_mesh.generations import (
    BOOT,
    BOOT_WANTED,
    CONFIRMED,
    DIRECTORY,
    ROLLED_BACK,
    SPEC,
    UNIT,
    WAITING,
    Entry,
    Generation,
    noted,
)

from .agent.files import write_atomically

PLACE = Path(DIRECTORY)


class GenerationError(RuntimeError):
    """A generation that cannot be restored; nothing was changed. The text says why and what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """What was done, and what of it failed, in words; `whole` when every file is as it was."""

    done: tuple[str, ...]
    problems: tuple[str, ...]
    whole: bool = True


def known(place: Path) -> dict[int, Generation]:
    """All generations by number; one that cannot be read is left out."""
    found = {}
    for manifest in place.glob("*/manifest.json"):
        with contextlib.suppress(OSError, ValueError):
            one = Generation.from_dict(json.loads(manifest.read_bytes()))
            found[one.number] = one
    return dict(sorted(found.items()))


def current(place: Path) -> int | None:
    """The number that the host is; None: nothing was ever changed here."""
    try:
        return int(os.readlink(place / "current"))
    except (OSError, ValueError):
        return None


def differing(one: Generation) -> list[str]:
    """Paths that are not as they were in it."""
    return [path for path, kept in (one.files or {}).items() if not kept.same(_present(path, kept))]


def roll_back(
    place: Path,
    number: int,
    why: str,
    remove_datapath: Callable[[], Sequence[str]],
    unless_confirmed: int | None = None,
) -> Restored | None:
    """Make the host what it was in the generation `number`; None when `unless_confirmed` needs no way back any more.

    `remove_datapath` takes ours out of the kernel, for a generation in which the host was no member. A change that
    waits for its confirmation has been taken back then; it goes on waiting, and what takes it back stays, when a file
    could not be restored. Raises GenerationError before anything is changed.
    """
    if not place.is_dir():
        raise GenerationError(f"there are no generations in {place}: nothing was changed on this host by the mesh yet")
    with _locked(place):
        found = known(place)
        if unless_confirmed is not None and (unless_confirmed not in found or found[unless_confirmed].state != WAITING):
            return None
        wanted = found.get(number)
        if wanted is None:
            there = ", ".join(map(str, found)) or "none"
            raise GenerationError(f"there is no generation {number}; there are: {there} (`isthmus generations`)")
        contents = _contents(place, wanted)
        restored = _restore(wanted, contents, remove_datapath)
        try:
            _keep(place, found, wanted, restored, why)
        except OSError as exc:
            problem = f"{exc.filename or place}: {exc.strerror}"
            return dataclasses.replace(restored, problems=(*restored.problems, problem), whole=False)
        if unless_confirmed is None and restored.whole:
            _systemctl("stop", f"{UNIT}.timer")
    return restored


def _keep(place: Path, found: dict[int, Generation], wanted: Generation, restored: Restored, why: str) -> None:
    """What the host is now. Raises OSError."""
    state = ROLLED_BACK if restored.whole else WAITING
    note = noted(why if restored.whole else f"generation {wanted.number} could not be restored", restored.problems)
    if restored.whole and wanted.state != CONFIRMED:  # who chooses it on the host has the way in
        _write(place, dataclasses.replace(wanted, state=CONFIRMED, note=""))
    if restored.whole:
        _set_current(place, wanted.number)
    for one in found.values():  # last, as it is what a further try looks at
        if one.state == WAITING and one.number != wanted.number:
            _write(place, dataclasses.replace(one, state=state, note=note))
    for path in (BOOT_WANTED, BOOT) if restored.whole else ():  # nothing waits any more
        Path(path).unlink(missing_ok=True)


def _contents(place: Path, wanted: Generation) -> dict[str, bytes]:
    """The kept files, all of them whole."""
    if wanted.files is None:
        raise GenerationError(f"generation {wanted.number} was never completed; choose another (`isthmus generations`)")
    contents = {}
    for path, kept in wanted.files.items():
        if kept.sha256 is None:
            continue
        copy = place / str(wanted.number) / kept.sha256
        try:
            contents[path] = copy.read_bytes()
        except OSError as exc:
            raise GenerationError(f"{copy}, the copy of {path}, cannot be read: {exc.strerror}") from exc
        if hashlib.sha256(contents[path]).hexdigest() != kept.sha256:
            raise GenerationError(f"{copy}, the copy of {path}, is damaged; choose another generation")
    return contents


def _restore(wanted: Generation, contents: dict[str, bytes], remove_datapath: Callable[[], Sequence[str]]) -> Restored:
    done: list[str] = []
    problems: list[str] = []
    whole = True

    def tried(*words: str) -> None:
        failure = _systemctl(*words)
        if failure:
            problems.append(f"systemctl {' '.join(words)}: {failure}")

    files = wanted.files or {}
    paths = differing(wanted)
    leaving = [Path(path).name for path in paths if files[path].absent and _is_unit(path)]
    if leaving:
        tried("disable", "--now", "--quiet", *leaving)
        done.append(f"stopped {', '.join(leaving)}")
    anew: set[str] = set()
    for path in paths:
        kept = files[path]
        if kept.link is not None and not kept.mark and not Path(kept.link).exists():
            done.append(f"left {path} as it is: {kept.link} is there no more")
            continue
        try:
            _put(Path(path), kept, contents.get(path))
        except OSError as exc:
            problems.append(f"{path}: {exc.strerror}")
            whole = False
            continue
        done.append(f"{'removed' if kept.absent else 'restored'} {path}")
        anew.update(kept.restarts)
    if any(_is_unit(path) for path in paths):
        tried("daemon-reload")
    units = sorted(Path(path).name for path, kept in files.items() if _is_unit(path) and not kept.absent)
    restarting = [name for name in units if name in anew]
    if restarting:
        tried("enable", "--quiet", *restarting)
        tried("restart", *restarting)
        done.append(f"restarted {', '.join(restarting)}")
    if SPEC in paths and files[SPEC].absent:
        try:
            done += [f"removed {words}" for words in remove_datapath()]
        except Exception as exc:  # whatever the kernel refuses: files and resolver are back, and it is told
            problems.append(f"the datapath: {exc}")
    return Restored(tuple(done), tuple(problems), whole)


def _is_unit(path: str) -> bool:
    return path.endswith((".service", ".path"))


def _present(path: str, kept: Entry) -> Entry:
    place = Path(path)
    if place.is_symlink():
        return Entry(link=os.readlink(place))
    try:
        content, status = place.read_bytes(), place.stat()
    except OSError:
        return Entry()
    return Entry(
        sha256=hashlib.sha256(content).hexdigest(),
        mode=status.st_mode & 0o7777,
        uid=status.st_uid,
        gid=status.st_gid,
        marked=bool(kept.mark) and kept.mark.encode() in content,
    )


def _put(path: Path, kept: Entry, content: bytes | None) -> None:
    if content is not None:
        write_atomically(path, content, kept.mode)
        os.chown(path, kept.uid, kept.gid)
    elif kept.link is not None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.symlink_to(kept.link)
        os.replace(temporary, path)
    else:
        path.unlink(missing_ok=True)


def _write(place: Path, one: Generation) -> None:
    text = json.dumps(one.to_dict(), indent=1, sort_keys=True) + "\n"
    write_atomically(place / str(one.number) / "manifest.json", text.encode(), 0o644)


def _set_current(place: Path, number: int) -> None:
    temporary = place / f".current.{os.getpid()}"
    temporary.symlink_to(str(number))
    os.replace(temporary, place / "current")


def _systemctl(*words: str) -> str:
    """systemd's words when it fails; empty when it did what it was told."""
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    except OSError as exc:
        return str(exc)
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip() or f"status {done.returncode}"


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    try:
        file = (place / "lock").open("a")
    except PermissionError as exc:
        raise GenerationError(f"{place / 'lock'}: {exc.strerror}; run this as root") from exc
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
