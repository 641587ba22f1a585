#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bgp
short_description: Have FRR announce a host's range to routers
version_added: 1.0.0
description:
  - Installs Debian's C(frr) and C(frr-pythontools) where they are missing, writes C(/etc/frr/frr.conf), turns on the
    daemons that it needs in C(/etc/frr/daemons), and starts FRR.
  - A configuration that differs is checked by C(vtysh) first, then made to run by its differences only, so that
    sessions stay, and written when the sessions that were there are there again, or at least one with a new router
    where theirs are given up. Otherwise the former one runs again, and the module fails. Only what the daemons
    themselves need (BFD for the first or no router any more) restarts FRR.
  - Where nothing differs it fails as well when FRR has never had a session with one of the routers since it runs so.
    Routers that are away are told as a warning then.
  - Nothing that routers send reaches the kernel, and nothing but the host's range and those of its pods leaves.
  - FRR that somebody else has configured is refused and left as it is.
  - With O(state=absent) FRR is as it was before; where it came with the mesh it is stopped and stays installed.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  own:
    description:
      - What the host is told, an element of C(bgp.hosts) that M(isthmus.mesh.plan) returns. Needed with
        O(state=present).
    type: dict
    suboptions:
      as_number:
        description: AS number of the host.
        type: int
        required: true
      routers:
        description: Routers that it announces its range to.
        type: list
        elements: dict
        required: true
        suboptions:
          address:
            description: Address of the router.
            type: str
            required: true
          as_number:
            description: Its AS number.
            type: int
            required: true
          bfd:
            description: Whether BFD watches the session.
            type: bool
            default: false
      estate_routers:
        description:
          - Addresses of all routers of the estate, of which O(passwords) may have some. Without it there are or were
            others that the inventory does not name any more, and O(passwords) may have any.
        type: list
        elements: str
      pods:
        description: Of a Kubernetes node, the ranges of its pods, which it announces as well.
        type: list
        elements: str
        default: []
  passwords:
    description: By address of a router, the password of the session (TCP MD5, RFC 2385).
    type: dict
    default: {}
  state:
    description: Whether the host announces its range.
    type: str
    choices: [present, absent]
    default: present
  timeout:
    description: Seconds to wait for sessions after a change.
    type: int
    default: 30
"""

EXAMPLES = r"""
- name: Routers know where the host's range is
  isthmus.mesh.bgp:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    own: "{{ __plan_result.bgp.hosts[inventory_hostname] }}"
    passwords: "{{ isthmus_bgp_passwords | default({}) }}"
"""

RETURN = r"""
lacking:
  description: By address of a router, why there is no session with it, after a change or where there is none at all.
  returned: success
  type: dict
  sample: {"198.51.100.1": "the router has another AS number than 65000 (state Idle)"}
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import frr, packages, units
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import bgp

LOOK_SECONDS = bgp.RETRY + 2  # within which FRR tries to connect, so that it is seen why it cannot
GUIDE = "`bgp` of the plan (isthmus.mesh.plan) has what to set on the router"


class Speaker:
    """FRR of this host on its way to what the plan says."""

    def __init__(self, module, changes):
        self.module = module
        self.changes = changes
        self.own = module.params["own"]
        self.host = module.params["spec"]["host"]
        self.systemd = units.Systemd(module)

    def fail(self, words, **more):
        self.module.fail_json(msg=f"On {self.host}: {words}", **more)

    def run(self):
        """Returns why routers have no session, by address, when something was changed."""
        refused = frr.problems(self.module, self.own)
        if refused:
            self.fail(f"{' '.join(refused)} Nothing was changed.")
        conf = bgp.frr_conf(self.own, self.module.params["spec"], frr.passwords(self.module))
        if self.install(conf):
            return {}
        before = frr.text_of(frr.CONF)
        daemons = frr.text_of(frr.DAEMONS) or ""
        state = self.systemd.show([frr.UNIT])[frr.UNIT]
        active, enabled = state.get("ActiveState") == "active", state.get("UnitFileState") == "enabled"
        known = frr.saved() if frr.ours() else {"daemons": frr.enabled_daemons(daemons)}
        needed = bgp.daemons(self.own)
        wanted = {**known["daemons"], **dict.fromkeys(needed, "yes")}
        all_daemons = frr.daemons_text(daemons, wanted)
        restarts = not active or all_daemons != daemons or not frr.alive(needed)
        if before == conf and enabled and not restarts:
            self.file(conf)  # mode and owner
            return self.unchanged()
        words = frr.refused(self.module, conf)
        if words:
            self.fail(f"FRR does not understand its new configuration: {words}. Nothing was changed.")
        if not frr.ours() and not self.module.check_mode:
            frr.save(
                {
                    "came_with_us": False,
                    "conf": before,
                    "daemons": frr.enabled_daemons(daemons),
                    "enabled": enabled,
                    "active": active,
                }
            )
        standing = self.established() if active else set()
        if restarts:
            self.restart(conf, all_daemons, active)
        elif before != conf and not self.module.check_mode:
            self.reload(conf)
        lacking = {} if self.module.check_mode else self.wait(standing, restarts, before, daemons)
        self.file(conf)
        if not enabled:
            self.changes.note(f"unit {frr.UNIT}", "disabled", "enabled")
            if not self.module.check_mode:
                self.systemd.run("enable", "--quiet", frr.UNIT)
        if self.is_alone(lacking):
            self.fail_alone(lacking)
        return lacking

    def unchanged(self):
        """Returns why routers have no session when none has one. Fails as the run before did when none ever had one
        with what runs; a router that went away later is no reason to stop a run that has nothing to do with it."""
        found = frr.neighbours(self.module) or {}
        with_routers = [found[one["address"]] for one in self.own["routers"] if one["address"] in found]
        if any(bgp.state(one) == bgp.ESTABLISHED for one in with_routers):
            return {}
        lacking = frr.await_sessions(self.module, self.own, min(self.module.params["timeout"], LOOK_SECONDS))
        if self.is_alone(lacking) and not any(one.get("connectionsEstablished") for one in with_routers):
            self.fail_alone(lacking)
        return lacking

    def is_alone(self, lacking):
        """Whether there is a session with no router."""
        return len(lacking) == len(self.own["routers"])

    def fail_alone(self, lacking):
        self.fail(
            f"there is no session with any router: {self.told(lacking)}. The range of this host is announced to "
            f"nobody; how packets of the mesh go was not changed. Next: {GUIDE}; run again.",
            lacking=lacking,
        )

    def install(self, conf):
        """The packages are there; whether that can only be predicted."""
        missing = frr.missing(self.module)
        if not missing:
            return False
        for name in missing:
            self.changes.note(f"package {name}", "", "installed")
        if self.module.check_mode:
            self.changes.note(frr.CONF, "", frr.masked(conf))
            return True
        if frr.PACKAGES[0] in missing:
            # What the package brings is how it was before us.
            frr.save({"came_with_us": True, "conf": None, "daemons": dict.fromkeys(frr.OURS, "no")})
        packages.install(self.module, missing, "install them by hand")
        return False

    def file(self, conf):
        self.changes.file(frr.CONF, conf, mode=0o640, owner="frr", shown=frr.shown(frr.text_of(frr.CONF), conf))

    def established(self):
        found = frr.neighbours(self.module) or {}
        return {address for address, one in found.items() if bgp.state(one) == bgp.ESTABLISHED}

    def restart(self, conf, daemons, active):
        """Starts FRR, or starts it again for the sake of its daemons."""
        self.changes.file(frr.DAEMONS, daemons, mode=0o640, owner="frr")
        self.file(conf)
        self.changes.note(f"unit {frr.UNIT}", "active" if active else "inactive", "restarted" if active else "active")
        if not self.module.check_mode:
            frr.restart(self.module)

    def reload(self, conf):
        words = frr.reload(self.module, conf)
        if words:
            self.fail(
                f"FRR did not take its new configuration: {words}. Next: see `journalctl -u {frr.UNIT}`; run again."
            )

    def wait(self, standing, restarted, before, daemons):
        """Until there is a session with each router. Fails when one that was there is not any more, or those that were
        there are given up for routers of which none has one: then what ran before runs again."""
        lacking = frr.await_sessions(self.module, self.own, self.module.params["timeout"])
        lost = {one: lacking[one] for one in standing & set(lacking)}
        if not lost and not (standing and self.is_alone(lacking)):
            return lacking
        if restarted:
            self.changes.file(frr.DAEMONS, daemons, mode=0o640, owner="frr")
            self.changes.file(frr.CONF, before, mode=0o640, owner="frr", secret=True)
            frr.restart(self.module)
        else:
            frr.reload(self.module, before)
        end = time.monotonic() + self.module.params["timeout"]
        while not standing <= self.established() and time.monotonic() < end:
            time.sleep(frr.PAUSE)
        back = "is there again" if standing <= self.established() else "is not there again yet"
        what = "a session is lost" if lost else "there is no session with any router"
        self.fail(
            f"with the new configuration {what}: {self.told(lost or lacking)}. FRR has its former configuration "
            f"again, and the session with {', '.join(sorted(standing))} {back}. Next: {GUIDE}; run again.",
            lacking=lacking,
        )

    @staticmethod
    def told(lacking):
        return "; ".join(f"router {address}: {words}" for address, words in sorted(lacking.items()))


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "own": {
                "type": "dict",
                "options": {
                    "as_number": {"type": "int", "required": True},
                    "routers": {
                        "type": "list",
                        "elements": "dict",
                        "required": True,
                        "options": {
                            "address": {"type": "str", "required": True},
                            "as_number": {"type": "int", "required": True},
                            "bfd": {"type": "bool", "default": False},
                        },
                    },
                    "estate_routers": {"type": "list", "elements": "str"},
                    "pods": {"type": "list", "elements": "str", "default": []},
                },
            },
            "passwords": {"type": "dict", "default": {}, "no_log": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "timeout": {"type": "int", "default": 30},
        },
        required_if=[("state", "present", ("own",))],
        supports_check_mode=True,
    )
    changes = Changes(module)
    if module.params["state"] == "absent":
        frr.absent(module, changes)
        module.exit_json(**changes.result(lacking={}))
    speaker = Speaker(module, changes)
    lacking = speaker.run()
    if lacking:
        module.warn(f"On {speaker.host} there is no session with {speaker.told(lacking)}. Next: {GUIDE}.")
    module.exit_json(**changes.result(lacking=lacking))


if __name__ == "__main__":
    main()
