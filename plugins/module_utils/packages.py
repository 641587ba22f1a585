# SPDX-License-Identifier: BSD-2-Clause
"""Packages of a host's distribution, by its own command: no Python bindings (python3-apt) are needed for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ansible.module_utils.basic import AnsibleModule

# Seconds are waited for another run of apt, such as unattended upgrades.
_APT = ("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=120")
_DNF = ("dnf", "-q", "-y", "--setopt=install_weak_deps=False")


def manager(module: AnsibleModule) -> str | None:
    """`apt-get` or `dnf`, what the host has; None for neither."""
    return next((name for name in ("apt-get", "dnf") if module.get_bin_path(name)), None)


def install(module: AnsibleModule, names: Sequence[str], instead: str) -> None:
    """Install packages without asking and without those they only recommend; `manager` must have found one.

    A service that a package would start is the caller's to mask before. Fails the module with the command's words when
    a second try with new package lists fails too; `instead` is what the operator can do besides repairing the sources.
    """
    if manager(module) == "dnf":
        commands = [[*_DNF, "install", *names], [*_DNF, "--refresh", "install", *names]]
    else:
        install_command = [*_APT, "install", "--no-install-recommends", *names]
        commands = [install_command, [*_APT, "update"], install_command]
    for command in commands:
        # Lists may be there and good: a refresh only when the first try fails.
        code, out, err = module.run_command(command, environ_update={"DEBIAN_FRONTEND": "noninteractive"})
        if code == 0 and "install" in command:
            return
    module.fail_json(
        msg=f"{' '.join(names)} cannot be installed: {(err or out).strip()[-1500:]}. Next: repair the package sources "
        f"of this host, or {instead}"
    )
