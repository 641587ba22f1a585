# SPDX-License-Identifier: BSD-2-Clause
"""A host of a site whose packets go through gateways: strongSwan on the gateway, and on every host the rules that let
nothing leave by another way."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import time
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import estate, links, packages, strongswan, units
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, atomic_write, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.encryption import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ansible.module_utils.basic import AnsibleModule

PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)
KINDS = ("x509", "x509ca", "private")
SYSCTLS = "/proc/sys/net/ipv4"
KERNEL, USER_SPACE = "kernel", "user space"
"""Who does ESP."""
FORWARDING, ACCEPTS_REDIRECTS = "ip_forward", "conf/all/accept_redirects"


class Gateway:
    """strongSwan as the spec's `connections` have it; with none of them, as it was before."""

    def __init__(
        self,
        module: AnsibleModule,
        changes: Changes,
        systemd: units.Systemd,
        own: Mapping[str, Any],
        secrets: Mapping[str, str],
    ) -> None:
        self.module = module
        self.changes = changes
        self.systemd = systemd
        self.own = own
        self.connections: Sequence[Mapping[str, Any]] = own.get("connections", [])
        self.given = secrets
        self.names = [ipsec.name_of(one) for one in self.connections]
        self.renewed = False  # certificates, or the authorities that are trusted
        self.kernel = False  # does ESP
        self.unproven: list[str] = []

    def swanctl(self, *words: str, must: bool = True) -> str:
        code, out, err = self.module.run_command([strongswan.SWANCTL, *words])
        if code != 0 and must:
            self.module.fail_json(
                msg=f"`swanctl {' '.join(words)}` failed: {(err or out).strip()[-1500:]}. Tunnels that were there "
                f"stay. Next: `journalctl -u {strongswan.UNIT}` on this host"
            )
        return str(out) if code == 0 else ""

    def files(self) -> bool:
        """Writes all of them; answers whether one is another than before."""
        wanted: dict[tuple[str, str], bytes | None] = {}
        counts: dict[str, int] = {}
        for one in self.connections:
            if "certificate" not in one:
                continue
            key = one["certificate"].replace(".crt", ".key")
            wanted["x509", ipsec.CERTIFICATE_FILE] = read_bytes(one["certificate"])
            wanted["private", ipsec.CERTIFICATE_FILE] = read_bytes(key)
            cluster = ipsec.cluster_of(one)
            authorities: list[bytes | None] = PEM.findall(read_bytes(one["ca"]) or b"") or [None]
            counts[cluster] = len(authorities)
            for name, content in zip(ipsec.authority_files(cluster, len(authorities)), authorities):
                wanted["x509ca", name] = content
        for (kind, name), content in wanted.items():
            path, secret = f"{strongswan.DIRECTORY}/{kind}/{name}", kind == "private"
            if content is not None:
                self.renewed |= self.changes.file(path, content, mode=0o600 if secret else 0o644, secret=secret)
            elif self.module.check_mode:
                self.renewed = True
                self.changes.note(path, "", "made by the run")
            else:
                self.module.fail_json(
                    msg=f"{path} has nothing to be made from: the certificate of this gateway, or the authority of the "
                    "other one, is not there. Next: run isthmus.mesh.site without --tags, which makes them; once more "
                    "after the first run of new clusters, which makes their authorities known"
                )
        for kind in KINDS:
            for path in ours(kind):
                if (kind, os.path.basename(path)) not in wanted:
                    self.renewed |= self.changes.absent(path, secret=kind == "private")
        if self.renewed and not self.module.check_mode:
            certified = {ipsec.name_of(one) for one in self.connections if "certificate" in one}
            note_unproven(unproven() | certified & self.there())
        for path in trials():
            self.changes.absent(path, secret=True)
        differs = self.renewed
        conf = ipsec.swanctl_conf(self.connections, counts, self.kernel)
        differs |= self.changes.file(strongswan.CONNECTIONS, conf)
        keys = self.keys()
        secrets = ipsec.secrets_conf(self.connections, keys)
        if secrets is None:
            differs |= self.changes.absent(strongswan.SECRETS, secret=True)
        else:
            differs |= self.changes.file(strongswan.SECRETS, secrets, mode=0o600, secret=True)
        self.unproven = [name for name in self.names if len(keys.get(name, ())) > 1]
        return differs

    def secrets(self) -> dict[str, str]:
        try:
            found = ipsec.pre_shared(self.connections, self.given)
        except KeyError as exc:
            return self.module.fail_json(  # type: ignore[no-any-return]
                msg=f"isthmus_ipsec_secrets has no pre-shared key for {exc.args[0]!r}: the gateway could not prove who "
                "it is. Nothing was changed of it. Next: add the key, in a vault, under this name"
            )
        for one in self.connections:
            key = found.get(ipsec.name_of(one), "a certificate is used")
            if not isinstance(key, str) or not key:
                self.module.fail_json(
                    msg=f"isthmus_ipsec_secrets has for {one['secret']!r} what is no pre-shared key: "
                    f"{'it is empty' if key in ('', None) else f'it is of the type {type(key).__name__}, not text'}. "
                    "Nothing was changed of the gateway. Next: give it a key, in quotes where it has digits only"
                )
        return found

    def keys(self) -> dict[str, list[str]]:
        """By connection the pre-shared keys that are to be there. Another one for a tunnel that is there comes after
        those that are there: the gateway takes all, and proves itself by the first one until `gateway_proof` has seen
        that the other gateway has the new one too."""
        before, found = keys_now(), {}
        there = self.there() if before else set()
        by_name = {ipsec.name_of(one): one for one in self.connections}
        for name, wanted in self.secrets().items():
            had = before.get(name, [])
            if wanted in had:
                found[name] = had
                if had[1:] and self.module.check_mode:
                    self.changes.note(
                        f"pre-shared key of {name}",
                        str(len(had)),
                        "the one of isthmus_ipsec_secrets, when the other gateway is seen to have it too",
                    )
            elif had and there.intersection(ipsec.sharing(self.connections, by_name[name])):
                found[name] = [*had, wanted]
                self.changes.note(
                    f"pre-shared key of {name}", "", "another one, used when the other gateway is seen to have it too"
                )
            else:
                found[name] = [wanted]
        return found

    def there(self) -> set[str]:
        """Names of the connections of which there is a tunnel."""
        if not os.path.exists(strongswan.SWANCTL):
            return set()
        return {name for name, children in self.sas().items() if "net" in children}

    def sas(self) -> dict[str, set[str]]:
        return strongswan.established(self.swanctl("--list-sas", must=False))

    def apply(self) -> None:
        left = unread()
        before = told() if left is None else left
        self.secrets()
        if not self.kernel and not self.module.check_mode:
            self.check_tun()
        check_addresses(self.module, self.own["networks"])
        note_before(self.module, self.changes, self.systemd, self.own["local"])
        lacking = strongswan.packages(gateway=True)
        for name in lacking:
            self.changes.note(f"package {name}", "", "installed")
        if lacking and not self.module.check_mode:
            packages.install(self.module, lacking, "install strongSwan by hand")
        forward(self.module, self.changes, self.own["local"])
        settings = self.changes.file(strongswan.SETTINGS, ipsec.strongswan_conf(self.kernel))
        settings |= self.interfaces()
        if not self.module.check_mode:
            note_unread(before)
        differs = self.files()
        state = self.systemd.show([strongswan.UNIT])[strongswan.UNIT]
        # Its package starts it too, and a run may have ended before this step.
        settings |= units.process_environment(state["MainPID"]).get(units.CONFIG_VARIABLE) != self.config()
        if state.get("UnitFileState") != "enabled" or state.get("ActiveState") != "active" or settings:
            self.changes.note(
                f"unit {strongswan.UNIT}",
                f"{state.get('UnitFileState') or 'absent'}, {state.get('ActiveState')}",
                "enabled, active",
            )
            if not self.module.check_mode:
                self.systemd.run("enable", "--quiet", strongswan.UNIT)
                self.systemd.run("restart", strongswan.UNIT)  # reads all that there is
                note_unproven(set())
                note_read()
            return
        if self.kernel:
            self.follow()
        missing = set(self.names) - strongswan.loaded(self.swanctl("--list-conns"))
        if missing and not differs:
            self.changes.note("strongSwan's connections", "", "\n".join(sorted(missing)))
        if left is not None and not differs:
            self.changes.note("strongSwan's files", "not read: a run was ended before that", "read")
        if not self.module.check_mode:
            if missing or differs or left is not None:
                self.load(before)
            note_read()
        self.begin(strongswan.established(self.swanctl("--list-sas")))
        self.unproven += self.older()

    def config(self) -> str:
        """Of what strongSwan has to begin anew for."""
        script = ipsec.interfaces_script(self.own, strongswan.INTERFACES) if self.kernel else ""
        return units.config_digest(ipsec.strongswan_conf(self.kernel), script)

    def check_tun(self) -> None:
        if not os.path.exists(strongswan.TUN) and self.module.get_bin_path("modprobe", opt_dirs=["/usr/sbin", "/sbin"]):
            self.module.run_command(["modprobe", "tun"])
        if not os.path.exists(strongswan.TUN):
            self.module.fail_json(
                msg=f"{strongswan.TUN} is not there, so strongSwan cannot make its device. Nothing was changed of "
                "the gateway. Next: load the module tun; in a container, let it have that device"
            )

    def interfaces(self) -> bool:
        """Those of ESP in the kernel, made when strongSwan begins; in user space it makes its device itself, which has
        the same name. And the unit's drop-in. Answers whether strongSwan has to begin anew."""
        unit = units.Units.path(strongswan.ROUTES_UNIT)
        gateway = "local" in self.own
        if gateway:
            self.changes.file(strongswan.BEGIN, ipsec.begin_script(self.connections), mode=0o755)
            self.changes.directory(os.path.dirname(strongswan.DROP_IN))
        else:
            self.changes.absent(strongswan.BEGIN)
        if self.kernel:
            found = [
                self.changes.file(
                    strongswan.INTERFACES, ipsec.interfaces_script(self.own, strongswan.INTERFACES), mode=0o755
                ),
                self.changes.file(strongswan.DROP_IN, drop_in(True, self.config())),
                self.changes.file(unit, routes_unit()),
            ]
            if any(found) and not self.module.check_mode:
                self.systemd.run("daemon-reload")
                self.systemd.run("enable", "--quiet", strongswan.ROUTES_UNIT)
            return any(found)
        if os.path.exists(unit) and not self.module.check_mode:
            self.systemd.run("disable", "--now", "--quiet", strongswan.ROUTES_UNIT)
        if os.path.exists(strongswan.INTERFACES) and not self.module.check_mode:
            self.module.run_command([strongswan.INTERFACES, "end"])
        found = [
            self.changes.file(strongswan.DROP_IN, drop_in(False, self.config()))
            if gateway
            else self.changes.absent(strongswan.DROP_IN),
            *(self.changes.absent(path) for path in (unit, strongswan.INTERFACES)),
        ]
        if any(found) and not self.module.check_mode:
            with contextlib.suppress(OSError):  # settings of the unit are there, ours or others'
                os.rmdir(os.path.dirname(strongswan.DROP_IN))
            self.systemd.run("daemon-reload")
        return any(found)

    def follow(self) -> None:
        """The routes' unit runs, which begins with strongSwan."""
        state = self.systemd.show([strongswan.ROUTES_UNIT])[strongswan.ROUTES_UNIT]
        if state.get("UnitFileState") != "enabled" or state.get("ActiveState") != "active":
            was = f"{state.get('UnitFileState') or 'absent'}, {state.get('ActiveState')}"
            self.changes.note(f"unit {strongswan.ROUTES_UNIT}", was, "enabled, active")
            if not self.module.check_mode:
                self.systemd.run("enable", "--quiet", strongswan.ROUTES_UNIT)
                self.systemd.run("restart", strongswan.ROUTES_UNIT)

    def begin(self, there: Mapping[str, set[str]]) -> None:
        """A tunnel that the other side refused is not asked for again by strongSwan."""
        for one in self.connections:
            name = ipsec.name_of(one)
            if one["begins"] and "net" not in there.get(name, ()):
                self.changes.note(f"tunnel {name}", "not there", "asked for")
                if not self.module.check_mode:
                    self.swanctl("--initiate", "--child", "net", "--ike", name, "--timeout", "5", must=False)

    def proven(self, name: str) -> None:
        """The tunnel `name` is made by the certificates that are there, or could be."""
        note_unproven(unproven() - {name})

    def older(self) -> list[str]:
        """Connections whose tunnel was made before this gateway got its certificate, or the authorities that it
        trusts: nobody knows yet whether it can be made anew. How old it is tells strongSwan only until IKE has a new
        key, which is no new authentication, so those that wait for their proof are kept in a file too."""
        paths = [path for kind in ("x509", "x509ca") for path in ours(kind)]
        written = max(map(os.path.getmtime, paths), default=0.0)
        listed, now = self.swanctl("--list-sas", must=False), time.time()
        certified = [ipsec.name_of(one) for one in self.connections if "certificate" in one]
        # What is written and the tunnel that is made by it may fall into one second, which is how ages are told.
        ages = {name: strongswan.age(listed, name) for name in certified}
        kept = unproven()
        return [name for name, age in ages.items() if age is not None and (now - age + 1 < written or name in kept)]

    def load(self, before: Mapping[str, str]) -> None:
        """Connections that changed are made anew: a tunnel keeps the networks and the key that it was made with, and
        one with a key that the other side does not have would end only when that is asked for again. It keeps the
        certificates too, also when it authenticates itself anew."""
        self.load_files()
        now = told()
        for name in sorted(before):
            if before[name] != now.get(name):
                self.swanctl("--terminate", "--ike", name, "--force", "--timeout", "5", must=False)
        for one in self.connections:
            name = ipsec.name_of(one)
            if self.renewed and "certificate" in one and one["begins"] and before.get(name) == now.get(name):
                self.renew(name)

    def load_files(self, *more: str) -> None:
        """What is in strongSwan's own files, or with `--file` in another one."""
        self.swanctl("--load-creds", "--clear", "--noprompt", *more)
        self.swanctl("--load-conns", *more)

    def renew(self, name: str) -> None:
        """Another tunnel beside the one that is there, which then goes. Where the other side does not take it yet, what
        is there stays."""
        old = strongswan.numbers(self.swanctl("--list-sas"), name)
        if not old:
            return
        self.swanctl("--initiate", "--child", "net", "--ike", name, "--timeout", "10", must=False)
        if set(strongswan.numbers(self.swanctl("--list-sas"), name)) - set(old):
            self.proven(name)
            for number in old:
                self.swanctl("--terminate", "--ike-id", number, "--timeout", "5", must=False)

    def remove(self) -> None:
        """All of ours. strongSwan itself goes on, for whoever else uses it."""
        before = told()
        gone = [self.changes.absent(strongswan.CONNECTIONS), self.changes.absent(strongswan.SECRETS, secret=True)]
        for kind in KINDS:
            gone += [self.changes.absent(path, secret=kind == "private") for path in ours(kind)]
        for path in trials():
            gone.append(self.changes.absent(path, secret=True))
        gone.append(self.changes.absent(strongswan.SETTINGS))
        self.changes.absent(strongswan.UNPROVEN)
        self.changes.absent(strongswan.UNREAD)
        if any(gone) and not self.module.check_mode:
            for name in sorted(before):
                self.swanctl("--terminate", "--ike", name, "--force", "--timeout", "5", must=False)
        self.interfaces()
        as_before(self.module, self.changes, self.systemd)


def left() -> bool:
    """Whether there is anything here that `apply` made."""
    own = (strongswan.ROUTES_UNIT, strongswan.GUARD_UNIT, strongswan.KEEPER_UNIT)
    files = (strongswan.CONNECTIONS, strongswan.BEFORE, strongswan.GUARD, strongswan.INTERFACES)
    files += (strongswan.BEGIN, strongswan.DROP_IN)
    places = (*files, *(units.Units.path(name) for name in own))
    return any(os.path.lexists(path) for path in places)


def ours(kind: str) -> list[str]:
    """Files of a kind that are the mesh's."""
    directory = f"{strongswan.DIRECTORY}/{kind}"
    names = os.listdir(directory) if os.path.isdir(directory) else ()
    return [f"{directory}/{name}" for name in sorted(names) if re.match(r"isthmus[-.].*pem$", name)]


def trials() -> list[str]:
    """Files with the keys of a trial of `gateway_proof`, which a run that was killed left."""
    directory = strongswan.DIRECTORY
    names = os.listdir(directory) if os.path.isdir(directory) else ()
    return [f"{directory}/{name}" for name in sorted(names) if name.startswith(strongswan.TRIAL)]


def unproven() -> set[str]:
    return set((read_bytes(strongswan.UNPROVEN) or b"").decode(errors="replace").split())


def note_unproven(names: set[str]) -> None:
    if names != unproven():
        atomic_write(strongswan.UNPROVEN, "".join(f"{name}\n" for name in sorted(names)).encode(), 0o644, 0, 0)


def unread() -> dict[str, str] | None:
    """`told` of before the changes that strongSwan has not read, None when there are none."""
    content = read_bytes(strongswan.UNREAD)
    return None if content is None else json.loads(content)


def note_unread(before: Mapping[str, str]) -> None:
    if not os.path.exists(strongswan.UNREAD):
        atomic_write(strongswan.UNREAD, json.dumps(before).encode(), 0o600, 0, 0)


def note_read() -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(strongswan.UNREAD)


def told() -> dict[str, str]:
    """Connections of our fragments, name to a digest of what is said of them and the key that they use; not which files
    their authorities' certificates are in."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in (read_bytes(strongswan.CONNECTIONS) or b"").decode(errors="replace").splitlines():
        begins = re.match(r"  (\S+) \{$", line)
        name = begins[1] if begins else name
        if name and "cacerts =" not in line:
            found.setdefault(name, []).append(line)
    for name, keys in keys_now().items():
        found.setdefault(name, []).append(keys[0])
    return {name: hashlib.sha256("\n".join(lines).encode()).hexdigest() for name, lines in found.items()}


def keys_now() -> dict[str, list[str]]:
    """By connection the pre-shared keys that strongSwan was given."""
    return ipsec.keys_of((read_bytes(strongswan.SECRETS) or b"").decode(errors="replace"))


def kernel_settings(module: AnsibleModule, local: str) -> dict[str, str]:
    """Paths below /proc/sys/net/ipv4 and what a gateway needs there. What its own IKE is answered comes by another way
    than the kernel would send to the other gateway, so the strict check of sources (rp_filter) is loose here. And while
    a tunnel is not there hosts are not told of a better way, which they would take for minutes."""
    device = f"conf/{links.of_address(module, local)}"
    return {
        FORWARDING: "1",
        "conf/all/send_redirects": "0",
        f"{device}/send_redirects": "0",
        f"{device}/rp_filter": "2",
    }


def settings_now(names: Iterable[str]) -> dict[str, str]:
    """ "" for one of a device that is not there."""
    return {name: (read_bytes(f"{SYSCTLS}/{name}") or b"").decode().strip() for name in names}


def note_before(module: AnsibleModule, changes: Changes, systemd: units.Systemd, local: str) -> None:
    """What `as_before` needs. Ahead of the packages, which have strongSwan enabled and started."""
    if os.path.exists(strongswan.BEFORE):
        return
    unit = systemd.show([strongswan.UNIT])[strongswan.UNIT].get("UnitFileState", "")
    now = settings_now([*kernel_settings(module, local), ACCEPTS_REDIRECTS])
    changes.directory(os.path.dirname(strongswan.BEFORE))
    changes.file(strongswan.BEFORE, json.dumps({"settings": now, "unit": unit}, indent=1, sort_keys=True) + "\n")


def forward(module: AnsibleModule, changes: Changes, local: str) -> None:
    wanted = kernel_settings(module, local)
    text = "".join(f"net/ipv4/{name} = {value}\n" for name, value in wanted.items())
    changes.file(strongswan.SYSCTL, f"# Written by isthmus.mesh: this host is a gateway of its site.\n{text}")
    write_settings(module, changes, settings_now(wanted), wanted)


def as_before(module: AnsibleModule, changes: Changes, systemd: units.Systemd) -> None:
    """The kernel's settings, and whether strongSwan runs."""
    before = json.loads(read_bytes(strongswan.BEFORE) or b'{"settings": {}, "unit": "enabled"}')
    changes.absent(strongswan.SYSCTL)
    # The first of them changes others: the kernel takes a host for one that takes redirects.
    for name in sorted(before["settings"], key=lambda name: name != FORWARDING):
        now = settings_now([name])
        if now[name]:
            write_settings(module, changes, now, {name: before["settings"][name]})
    state = systemd.show([strongswan.UNIT])[strongswan.UNIT]
    runs = state.get("UnitFileState") == "enabled" or state.get("ActiveState") == "active"
    if runs and before["unit"] != "enabled":
        changes.note(f"unit {strongswan.UNIT}", "enabled, active", "disabled, inactive")
    if runs and not module.check_mode:
        systemd.run(
            *(("restart",) if before["unit"] == "enabled" else ("disable", "--now", "--quiet")), strongswan.UNIT
        )
    changes.absent(strongswan.BEFORE)


def write_settings(module: AnsibleModule, changes: Changes, now: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name, value in wanted.items():
        if now[name] == value:
            continue
        changes.note(f"net/ipv4/{name}", now[name], value)
        if module.check_mode:
            continue
        try:
            with open(f"{SYSCTLS}/{name}", "w", encoding="ascii") as file:
                file.write(value)
        except OSError as exc:
            module.fail_json(
                msg=f"net/ipv4/{name} cannot be set to {value}: {exc}. Next: set it for this host from outside"
            )


def check_addresses(module: AnsibleModule, networks: Iterable[str]) -> None:
    """strongSwan in user space refuses a tunnel for a network in which it has no address to send from."""
    found = [
        ipaddress.ip_address(one["local"])
        for entry in links.listed(module, "address")
        for one in entry.get("addr_info", ())
        if one.get("family") == "inet"
    ]
    for text in networks:
        if not any(address in ipaddress.ip_network(text) for address in found):
            module.fail_json(
                msg=f"This gateway has no address in {text}, a network of its site, and strongSwan's ESP in user space "
                "makes no tunnel for such a one. Nothing was changed of the gateway. Next: give the host an address "
                "there, or name one wider network in isthmus_estate.sites.SITE.ipsec.networks that holds both"
            )


def drop_in(kernel: bool, config: str) -> str:
    """For strongSwan's unit: it tells by what `config` it was started; the tunnels are asked for when it has read its
    connections; and where the `kernel` does ESP its interfaces are there while it is, as its device in user space would
    be."""
    begin, end = f"ExecStartPre=-{strongswan.INTERFACES} begin\n", f"ExecStopPost=-{strongswan.INTERFACES} end\n"
    return f"""\
# Written by isthmus.mesh; changes made here by hand are replaced by the next run of the playbook.
[Service]
Environment={units.CONFIG_VARIABLE}={config}
{begin if kernel else ""}ExecStartPost=-{strongswan.BEGIN}
{end if kernel else ""}"""


def routes_unit() -> str:
    return f"""\
# Written by isthmus.mesh; changes made here by hand are replaced by the next run of the playbook.
[Unit]
Description=Isthmus mesh: routes into the tunnels between gateways
Documentation=https://github.com/isthmus-mesh/isthmus
After={strongswan.UNIT}
PartOf={strongswan.UNIT}
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={strongswan.INTERFACES} follow
Restart=always
RestartSec=1
CapabilityBoundingSet=CAP_NET_ADMIN
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateDevices=yes
PrivateTmp=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK

[Install]
WantedBy={strongswan.UNIT}
"""


def check_near(module: AnsibleModule, via: str) -> None:
    """The rules know a gateway as the next hop, and nothing else could keep a router in between from another way."""
    code, out, _err = module.run_command(["ip", "-json", "route", "get", via])
    way = (json.loads(out) if code == 0 and out.strip() else [{"gateway": "no route"}])[0]
    if "gateway" in way:
        module.fail_json(
            msg=f"The site's gateway {via} is not on a network of this host ({way['gateway']} is in between), so what "
            "is to go to it could leave for the other site in clear. Its agent and its rules are as they were. Next: "
            "name a gateway that all hosts of the site have on their own network"
        )


def guard_unit(kernel: bool) -> str:
    """Before the network is up, so that nothing leaves in clear at boot. `kernel`: it does ESP."""
    more = f"-{strongswan.NFT} -f {strongswan.GUARD_OF_KERNEL}"
    start, again = (f"\nExecStart={more}", f"\nExecReload={more}") if kernel else ("", "")
    return f"""\
# Written by isthmus.mesh; changes made here by hand are replaced by the next run of the playbook.
[Unit]
Description=Isthmus mesh: nothing between sites beside the gateways
Documentation=https://github.com/isthmus-mesh/isthmus
DefaultDependencies=no
After=local-fs.target nftables.service
Before=network-pre.target shutdown.target
Wants=network-pre.target
Conflicts=shutdown.target
PartOf=nftables.service
ReloadPropagatedFrom=nftables.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={strongswan.NFT} -f {strongswan.GUARD}{start}
ExecReload={strongswan.NFT} -f {strongswan.GUARD}{again}
ExecStop=-{strongswan.NFT} delete table ip {ipsec.GUARD}

[Install]
WantedBy=sysinit.target
"""


def guard(module: AnsibleModule, changes: Changes, systemd: units.Systemd, text: str | None, kernel: bool) -> None:
    """The rules, in the files and in the kernel; None: there are none. `kernel`: it does ESP."""
    if text is None:
        unload(module, changes, systemd, strongswan.KEEPER_UNIT, strongswan.KEEPER, strongswan.KEPT)
        unload(module, changes, systemd, strongswan.GUARD_UNIT, strongswan.GUARD, strongswan.GUARD_OF_KERNEL)
        return
    lacking = strongswan.packages(gateway=False)
    for name in lacking:
        changes.note(f"package {name}", "", "installed")
    if lacking and not module.check_mode:
        packages.install(module, lacking, "install nftables by hand")
    changes.directory(os.path.dirname(strongswan.GUARD))
    file = changes.file(strongswan.GUARD, text)
    if kernel:
        file |= changes.file(strongswan.GUARD_OF_KERNEL, ipsec.guard_of_kernel())
    else:
        file |= changes.absent(strongswan.GUARD_OF_KERNEL)
    unit = changes.file(units.Units.path(strongswan.GUARD_UNIT), guard_unit(kernel))
    if unit and not module.check_mode:
        systemd.run("daemon-reload")
    state = systemd.show([strongswan.GUARD_UNIT])[strongswan.GUARD_UNIT]
    there = strongswan.guard_in_kernel(module)
    if (
        state.get("UnitFileState") != "enabled"
        or state.get("ActiveState") != "active"
        or file
        or there != strongswan.guard_wanted(text)
    ):
        changes.note(f"nft table ip {ipsec.GUARD}", "\n".join(there), "\n".join(strongswan.guard_wanted(text)))
        if not module.check_mode:
            systemd.run("enable", "--quiet", strongswan.GUARD_UNIT)
            systemd.run("restart" if state.get("ActiveState") != "active" else "reload", strongswan.GUARD_UNIT)
    keep(module, changes, systemd, text, kernel)


def keep(module: AnsibleModule, changes: Changes, systemd: units.Systemd, text: str, kernel: bool) -> None:
    """The rules once more, in a table that a process of ours has: whoever flushes the ruleset, as each restart of
    nftables.service does, leaves no moment in which neither table is there. While this one is made anew, or its process
    died, it is the other one that is there."""
    unit = changes.file(
        units.Units.path(strongswan.KEEPER_UNIT),
        units.keeper_unit(strongswan.KEEPER, strongswan.KEPT, strongswan.GUARD_UNIT),
    )
    if unit and not module.check_mode:
        systemd.run("daemon-reload")
    differs = [
        unit,
        changes.file(strongswan.KEEPER, ipsec.keeper_program(strongswan.KEEPER), mode=0o755),
        changes.file(strongswan.KEPT, ipsec.kept(text, kernel)),
    ]
    state = systemd.show([strongswan.KEEPER_UNIT])[strongswan.KEEPER_UNIT]
    there, wanted = strongswan.guard_in_kernel(module, ipsec.KEPT), strongswan.guard_wanted(text)
    runs = state.get("UnitFileState") == "enabled" and state.get("ActiveState") == "active"
    if runs and not any(differs) and there == wanted:
        return
    changes.note(f"nft table ip {ipsec.KEPT}", "\n".join(there), "\n".join(wanted))
    if module.check_mode:
        return
    systemd.run("enable", "--quiet", strongswan.KEEPER_UNIT)
    code, out, err = module.run_command(["systemctl", "restart", strongswan.KEEPER_UNIT])
    if code != 0:
        module.fail_json(
            msg=f"{strongswan.KEEPER_UNIT} does not start: {systemd.journal(strongswan.KEEPER_UNIT) or err or out}. "
            f"The rules are there (`nft list table ip {ipsec.GUARD}`), but whoever flushes the ruleset, as each "
            "restart of nftables.service does, would open the way in clear for a moment. No tunnel was changed. "
            f"Next: see `journalctl -u {strongswan.KEEPER_UNIT}`; an old kernel or nftables is to be updated"
        )


def unload(module: AnsibleModule, changes: Changes, systemd: units.Systemd, name: str, *files: str) -> None:
    """A unit that loads rules is off and away, and what it reads."""
    path = units.Units.path(name)
    if os.path.exists(path) and not module.check_mode:
        systemd.run("disable", "--now", "--quiet", name)
    if changes.absent(path) and not module.check_mode:
        systemd.run("daemon-reload")
    for file in files:
        changes.absent(file)


def apply(
    module: AnsibleModule, changes: Changes, section: Mapping[str, Any] | None, secrets: Mapping[str, str]
) -> tuple[list[str], str | None, list[str]]:
    """The host is what its spec's `ipsec` says, None: it has no part. Answers the names of its tunnels, who does ESP on
    a gateway, None on other hosts, and the names of tunnels that wait for `gateway_proof`.

    Fails the module with words when it cannot be so."""
    own = section or {"far": {}}
    systemd = units.Systemd(module)
    text = ipsec.guard(own)
    for via in ipsec.gateways_of(own):
        check_near(module, via)
    gateway = Gateway(module, changes, systemd, own, secrets)
    gateway.kernel = bool(own.get("local")) and strongswan.kernel_does_esp(module)
    # What is closed is closed before a tunnel changes, and opened after it.
    if text is not None:
        guard(module, changes, systemd, text, gateway.kernel)
    if own.get("local"):
        gateway.apply()
    elif os.path.exists(strongswan.CONNECTIONS) or os.path.exists(strongswan.BEFORE):
        gateway.remove()
    if text is None:
        guard(module, changes, systemd, None, False)
    does_esp = KERNEL if gateway.kernel else USER_SPACE
    return gateway.names, does_esp if own.get("local") else None, gateway.unproven


def before_agent(
    module: AnsibleModule, changes: Changes, section: Mapping[str, Any] | None, secrets: Mapping[str, str]
) -> None:
    """What of `apply` comes before the agent has the spec: a gateway has its tunnels, and the rules, when the agents
    lead packets to it for networks that its own one has not heard of. The rules do not come without the tunnel, through
    which Ansible may enter the gateway. Whatever else there is changes after the agent.

    Fails the module with words, as `apply`, and where packets for a gateway would go elsewhere first."""
    own = section or {"far": {}}
    for via in ipsec.gateways_of(own):
        check_near(module, via)
    before = None
    with contextlib.suppress(ValueError):  # no agent runs by a file that is damaged
        before = estate.read_json(estate.NODE)
    known = ((before or {}).get("ipsec") or {"far": {}})["far"].values()
    heard_of = {network for entry in known for network in entry["networks"]}
    demanded = [entry["networks"] for entry in own["far"].values() if entry["stage"] == Stage.DEMANDS.word]
    if "local" in own and not heard_of.issuperset(network for networks in demanded for network in networks):
        apply(module, changes, section, secrets)
