# SPDX-License-Identifier: BSD-2-Clause
"""Whether the gateways of a running pair of sites take each other by what a run changed: another pre-shared key, a
renewed certificate or authority. The tunnel that is there goes on meanwhile, and afterwards where they do not.

strongSwan proves itself by one of the keys that it has for another gateway, named first here, and takes each of them.
So two gateways can make a tunnel whenever the first of each is among those of the other. From [old] to [new] each goes
over [old, new] (`gateways.Gateway.keys`), [new, old] (`USED`), and to [new] (`ONLY`), and takes a step when it has seen
that the other one has taken the step before: at each moment a tunnel that is lost can be made anew. With yet another
key before the end all that were there stay beside it, as the other one may be a step behind.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import gateways, strongswan, units
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

TAKEN, USED, ONLY = "taken", "used", "only"
"""What becomes of another pre-shared key."""
PATIENCE = 5.0
"""Seconds for which a gateway that refuses is asked again: one that reads its own keys at that moment has none."""
WAIT = 10.0
"""Seconds for an answer, and for a tunnel in the place of one that is there."""
PAUSE = 0.5  # seconds from one look to the next
REFUSED = "received AUTHENTICATION_FAILED"


class Proof:
    """On a gateway, by its spec's `ipsec`."""

    def __init__(
        self, module: AnsibleModule, changes: Changes, own: Mapping[str, Any], secrets: Mapping[str, str]
    ) -> None:
        self.module = module
        self.changes = changes
        self.gateway = gateways.Gateway(module, changes, units.Systemd(module), own, secrets)
        self.connections = {ipsec.name_of(one): one for one in self.gateway.connections}
        self.wanted = self.gateway.secrets()
        self.keys = gateways.keys_now()
        self.problems: list[str] = []

    def use(self) -> None:
        """Gateways of ours that have the new key beside the former one prove themselves by the new one."""
        for name, one in self.connections.items():
            keys, wanted = self.keys.get(name, []), self.wanted.get(name, "")
            if wanted not in keys[1:] or not one["ours"]:
                continue
            others = without(keys, wanted)
            said = self.tried(one, [wanted, *others])
            if not said:
                self.write(name, [wanted, *others])
            elif REFUSED in said:
                self.write(name, others)
                self.refused(name, said)
            else:
                self.problems.append(
                    f"it is not known whether {self.other(one)} has the new pre-shared key: {said}. "
                    f"{self.as_before(name)}, by the former key, and the new one is taken too. Next: run "
                    "isthmus.mesh.site again when that gateway answers"
                )

    def end(self) -> None:
        """The former keys go; tunnels are made by the new ones, and by certificates that are newer than they are."""
        for name, one in self.connections.items():
            keys, wanted = self.keys.get(name, []), self.wanted.get(name, "")
            if not one["ours"] and wanted in keys[1:]:
                self.change(name, wanted, without(keys, wanted))
            elif not one["ours"] and keys[1:] and keys[0] == wanted:
                self.write(name, keys[:1])  # the former one was put back, by which the tunnel is there
            elif keys[1:] and keys[0] == wanted:
                said = self.tried(one, keys[:1])
                if said:
                    self.problems.append(
                        f"{self.other(one)} has the pre-shared key of {one['secret']!r} and does not use it yet: "
                        f"{said}. {self.as_before(name)}; this gateway still takes the former key "
                        "too. Next: run isthmus.mesh.site again, over both gateways"
                    )
                    continue
                self.write(name, keys[:1])
                if one["begins"]:
                    self.anew(name)
        for name in self.gateway.older():
            one = self.connections[name]
            said = self.tried(one, ()) if one["ours"] else ""
            if said:
                self.problems.append(
                    f"{self.other(one)} and this gateway do not take each other's certificates any more: "
                    f"{said}. {self.as_before(name)}, and is lost when it has to be made anew, "
                    "within a day. Next: run isthmus.mesh.site over both gateways, which brings them certificates and "
                    "each other's authorities"
                )
                continue
            self.gateway.proven(name)
            if one["begins"]:
                self.gateway.renew(name)

    def change(self, name: str, wanted: str, others: Sequence[str]) -> None:
        """Of a gateway that is not ours it is seen only by a tunnel whether it has the new key."""
        one = self.connections[name]
        there = self.gateway.there().intersection(ipsec.sharing(self.gateway.connections, one))
        tunnel = min(there, default="")
        if tunnel:
            with self.loaded(one, [wanted, *others]):
                there = set() if self.anew(tunnel) else there
        if not there:  # any more, or by the former key
            self.write(name, [wanted])
            return
        said = strongswan.last_words(self.module, tunnel, strongswan.quoted)
        self.write(name, others)
        self.problems.append(
            f"{self.other(one)} did not take the new pre-shared key of {one['secret']!r} (isthmus_ipsec_secrets): "
            f"{said or 'strongSwan has not said why'}. {self.as_before(tunnel)}, by the former key. Next: set the same "
            "key on that gateway, whose engineer has all the rest from isthmus.mesh.plan, or put the former one back "
            "into the vault, and run isthmus.mesh.site again"
        )

    def refused(self, name: str, said: str) -> None:
        one = self.connections[name]
        host = ipsec.other_end(one)["host"]
        self.problems.append(
            f"{self.other(one)} has another pre-shared key than this gateway ({one['local_id']}) has for "
            f"{one['secret']!r} in isthmus_ipsec_secrets: {said}. {self.as_before(name)}, by the "
            f"former key, and the new one was taken away. Next: let both gateways have the same value, and run "
            f"isthmus.mesh.site again over both (a --limit has to name {host} too)"
        )

    def other(self, one: Mapping[str, Any]) -> str:
        return f"the gateway {one['remote_id']} of site {one['site']} ({one['remote']})"

    def as_before(self, name: str) -> str:
        return f"The tunnel {name} {'is there as before' if name in self.gateway.there() else 'is not there'}"

    def write(self, name: str, keys: Sequence[str]) -> None:
        self.keys[name] = list(keys)
        # For its other first key the tunnel is not to be ended.
        gateways.note_unread({other: said for other, said in gateways.told().items() if other != name})
        self.changes.file(
            strongswan.SECRETS,
            ipsec.secrets_conf(self.gateway.connections, self.keys) or "",
            mode=0o600,
            secret=True,
        )
        self.gateway.load_files()
        gateways.note_read()

    @contextlib.contextmanager
    def loaded(self, one: Mapping[str, Any], keys: Sequence[str]) -> Iterator[None]:
        """strongSwan has for a while these pre-shared keys of a connection, and the connection that tries them."""
        counts = {}
        if "ca" in one:
            cluster = ipsec.cluster_of(one)
            files = ipsec.authority_files(cluster, 2)
            counts[cluster] = sum(os.path.exists(f"{strongswan.DIRECTORY}/x509ca/{name}") for name in files)
        # Beside its own file: where that one is strongSwan looks for certificates.
        directory, known = strongswan.DIRECTORY, len(self.keys.get(ipsec.name_of(one), ()))
        gateways.note_unread(gateways.told())
        with tempfile.NamedTemporaryFile("w", prefix=strongswan.TRIAL, suffix=".conf", dir=directory) as file:
            file.write(ipsec.trial_conf(one, counts, keys, f"{directory}/swanctl.conf", known))
            file.flush()
            self.gateway.load_files("--file", file.name)
        try:
            yield
        finally:
            trial = ipsec.trial_of(one)
            self.gateway.swanctl("--terminate", "--ike", trial, "--force", "--timeout", "5", must=False)
            self.gateway.load_files()
            gateways.note_read()

    def tried(self, one: Mapping[str, Any], keys: Sequence[str]) -> str:
        """What strongSwan said when the gateways do not take each other by these keys, or by their certificates; ""
        when they do."""
        ask = [strongswan.SWANCTL, "--initiate", "--ike", ipsec.trial_of(one), "--timeout", str(int(WAIT))]
        end = time.monotonic() + PATIENCE
        with self.loaded(one, keys):
            while True:
                code, out, err = self.module.run_command(ask)
                if code == 0:
                    return ""
                if time.monotonic() >= end:
                    return strongswan.quoted(out) or (err or out).strip().rpartition("\n")[2]
                time.sleep(PAUSE)

    def anew(self, name: str) -> bool:
        """Another tunnel by the keys that are loaded, before the one that is there goes; False: that one stays."""
        before = set(strongswan.numbers(self.gateway.swanctl("--list-sas"), name))
        self.gateway.swanctl("--rekey", "--ike", name, "--reauth", must=False)
        begun = time.monotonic()
        while True:
            listed = self.gateway.swanctl("--list-sas")
            new = set(strongswan.numbers(listed, name)) - before
            if new and "net" in strongswan.established(listed).get(name, ()):
                return True
            asks, passed = strongswan.connecting(listed, name), time.monotonic() - begun
            if passed >= WAIT or (passed >= 1 and not asks and not new):
                for number in asks:
                    self.gateway.swanctl("--terminate", "--ike-id", number, "--force", "--timeout", "5", must=False)
                return False
            time.sleep(PAUSE)


def without(keys: Sequence[str], wanted: str) -> list[str]:
    """The other ones."""
    return [key for key in keys if key != wanted]


def prove(
    module: AnsibleModule, changes: Changes, section: Mapping[str, Any] | None, secrets: Mapping[str, str], keys: str
) -> list[str]:
    """`USED` or `ONLY`, on a gateway. Answers the names of its tunnels.

    Fails the module with words of each tunnel that is still made by what was there before."""
    proof = Proof(module, changes, section or {}, secrets)
    if not module.check_mode:
        proof.use() if keys == USED else proof.end()
    if proof.problems:
        module.fail_json(msg="; ".join(proof.problems), changed=changes.changed)
    return proof.gateway.names
