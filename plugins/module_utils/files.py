# SPDX-License-Identifier: BSD-2-Clause
"""Files as a module changes them: atomic, with owner and mode, predicted in check mode, shown in the diff.

A module makes one `Changes`, calls it for each thing that must be so, and ends with ``exit_json(**changes.result())``.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import pwd
import stat
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def read_bytes(path: str) -> bytes | None:
    """Content of a file, ``None`` when there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def fsync_directory(path: str) -> None:
    """Make a rename in the directory ``path`` survive a power failure."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str, content: bytes, mode: int, uid: int, gid: int) -> None:
    """Replace ``path`` in one step; readers see the old or the new content, never a part, never another mode."""
    directory = os.path.dirname(path)
    handle, temporary = tempfile.mkstemp(prefix="." + os.path.basename(path) + ".", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchown(file.fileno(), uid, gid)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_directory(directory)


def _uid(owner: str) -> int | None:
    try:
        return pwd.getpwnam(owner).pw_uid
    except KeyError:
        return None


def _gid(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _text(content: bytes | None, secret: bool) -> str:
    if content is None:
        return ""
    if secret:
        return "(secret)\n"
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return f"(binary, {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()})\n"


class Changes:
    """What one module call changes on this host. In check mode everything is compared and nothing is touched."""

    def __init__(self, module: AnsibleModule) -> None:
        # Hosts with a stricter mask (0027, 0077) would get directories that etcd's user cannot enter. Secrets are made
        # with a mode of their own.
        os.umask(0o022)
        self.module = module
        self.changed = False
        self.diff: list[dict[str, Any]] = []
        self.replaced: dict[str, float] = {}
        """Files whose content is not what it was, with the time at which that content was written (seconds)."""

    def note(self, header: str, before: str, after: str) -> None:
        """Record a change that is not a file; ``before`` and ``after`` are shown by ``--diff``, so no secrets."""
        self.changed = True
        self.diff.append(
            {
                "before_header": header,
                "after_header": header,
                "before": before if before.endswith("\n") or not before else before + "\n",
                "after": after if after.endswith("\n") or not after else after + "\n",
            }
        )

    def file(
        self,
        path: str,
        content: bytes | str,
        mode: int = 0o644,
        owner: str = "root",
        group: str | None = None,
        secret: bool = False,
        shown: tuple[str, str] | None = None,
    ) -> bool:
        """``path`` has this content, mode, owner and group (default: the group named like the owner).

        ``secret`` hides the content in the diff; ``shown`` replaces both sides of it by a description.
        Returns whether it had to change. Fails the module when the owner does not exist (not in check mode: an earlier
        task may make it).
        """
        wanted = content.encode() if isinstance(content, str) else content
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            found = None
        regular = found is not None and stat.S_ISREG(found.st_mode)
        before = read_bytes(path) if regular else None
        attributes_differ = self._attributes_differ(path, found, mode, owner, group)
        if regular and before == wanted and not attributes_differ:
            return False
        if shown is not None:
            self.note(path, *shown)
        elif before == wanted and attributes_differ is not None:
            self.note(path, *attributes_differ)
        else:
            self.note(path, _text(before, secret), _text(wanted, secret))
        if found is not None and before != wanted:
            self.replaced[path] = found.st_mtime
        if not self.module.check_mode:
            uid, gid = self._ids(path, owner, group)
            if found is not None and stat.S_ISDIR(found.st_mode):
                self.module.fail_json(msg=f"{path} is a directory, a file belongs there; move it away and run again.")
            atomic_write(path, wanted, mode, uid, gid)
        return True

    def directory(self, path: str, mode: int = 0o755, owner: str = "root", group: str | None = None) -> bool:
        """``path`` is a directory with this mode, owner and group; parents are made with 0755 root."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            found = None
        if found is not None and not stat.S_ISDIR(found.st_mode):
            self.module.fail_json(msg=f"{path} exists and is not a directory; move it away and run again.")
        differs = self._attributes_differ(path, found, mode, owner, group)
        if not differs:
            return False
        self.note(path, differs[0], differs[1])
        if not self.module.check_mode:
            uid, gid = self._ids(path, owner, group)
            os.makedirs(path, exist_ok=True)
            os.chown(path, uid, gid)
            os.chmod(path, mode)
        return True

    def link(self, path: str, target: str) -> bool:
        """``path`` is a symbolic link to ``target``, replaced in one step."""
        before = os.readlink(path) if os.path.islink(path) else ""
        if before == target:
            return False
        if not before and os.path.lexists(path):
            self.module.fail_json(msg=f"{path} exists and is not a symbolic link; move it away and run again.")
        self.note(path, before, target)
        if not self.module.check_mode:
            temporary = f"{path}.{os.getpid()}.new"
            os.symlink(target, temporary)
            os.replace(temporary, path)
            fsync_directory(os.path.dirname(path))
        return True

    def absent(self, path: str, secret: bool = False) -> bool:
        """There is no file or link at ``path``."""
        if not os.path.lexists(path):
            return False
        regular = os.path.isfile(path) and not os.path.islink(path)
        self.note(path, _text(read_bytes(path), secret) if regular else "present", "")
        if not self.module.check_mode:
            os.unlink(path)
            fsync_directory(os.path.dirname(path))
        return True

    def result(self, **more: Any) -> dict[str, Any]:
        """Arguments for ``exit_json``: ``changed``, ``diff`` and whatever else is given."""
        return {"changed": self.changed, "diff": self.diff, **more}

    def _attributes_differ(
        self, path: str, found: os.stat_result | None, mode: int, owner: str, group: str | None
    ) -> tuple[str, str] | None:
        after = f"{owner}:{group or owner} {mode:04o}"
        if found is None:
            return "", after
        if stat.S_IMODE(found.st_mode) == mode and found.st_uid == _uid(owner) and found.st_gid == _gid(group or owner):
            return None
        try:
            user = pwd.getpwuid(found.st_uid).pw_name
        except KeyError:
            user = str(found.st_uid)
        try:
            team = grp.getgrgid(found.st_gid).gr_name
        except KeyError:
            team = str(found.st_gid)
        return f"{user}:{team} {stat.S_IMODE(found.st_mode):04o}", after

    def _ids(self, path: str, owner: str, group: str | None) -> tuple[int, int]:
        uid, gid = _uid(owner), _gid(group or owner)
        if uid is not None and gid is not None:
            return uid, gid
        return self.module.fail_json(  # type: ignore[no-any-return]
            msg=f"{path} must belong to {owner}:{group or owner}, which does not exist on this host. "
            "Run the role that makes the user first (isthmus.mesh.pki makes etcd's)."
        )
