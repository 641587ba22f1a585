#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: verify
short_description: Prove that the mesh does on a host what the inventory says
version_added: 1.0.0
description:
  - Looks at the host from all sides, units, specification, certificates, etcd and its access rights, published state,
    BPF maps and routes against what the agent wants, names, and packets to the other hosts, to pods on every Kubernetes
    node and to every service, and fails with the list of all problems.
  - On a Kubernetes node it compares the pods that are published with those that are there, and sends packets from a
    pod's network namespace, which it enters for that; it makes no pod.
  - With O(scope=host) it looks only at what the host itself does, and at what worked there before a change, as the
    playbook site does before it goes on to other hosts.
  - Changes nothing.
extends_documentation_fragment:
  - isthmus.mesh.attributes.info
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  record:
    description:
      - The estate record that M(isthmus.mesh.plan) returns.
    type: dict
    required: true
  services:
    description:
      - Definitions of the services that the inventory has in the host's cluster.
    type: list
    elements: dict
    required: true
  hosts:
    description:
      - Hosts that packets must reach; those that the run could not reach are left out.
      - With O(scope=step) those of sites with C(routing=auto) of which it is asked whether they are reached natively.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the host.
        type: str
        required: true
      cluster:
        description: Its cluster.
        type: str
        required: true
      mesh4:
        description: Its mesh address.
        type: str
        required: true
  bgp:
    description:
      - What the plan has of the host in C(bgp.hosts). There must be a session with each router, which must have been
        sent the host's range. What no router sends is told only.
    type: dict
  controller_time:
    description:
      - The controller's time, in UTC as C(YYYY-MM-DDTHH:MM:SSZ), to compare the host's clock with.
    type: str
  max_clock_skew:
    description:
      - Seconds by which the host's clock may differ from the controller's.
    type: int
    default: 120
  timeout:
    description:
      - Seconds to wait for each answer.
    type: int
    default: 3
  scope:
    description:
      - V(mesh) looks at everything.
      - V(host) looks at units, the own member of etcd, its list of revoked certificates as O(record) has it, and the
        agent with its datapath, by the specification that is on the host. What other hosts, peers and the rest of the
        record have a part in is left out, since a run may not have come to them yet.
      - V(step) proves, where encryption or native routing is being turned on or off or keys are replaced, that the host
        reaches every other of these sites the new way, as the agent on it runs now. Tunnels between gateways are proven
        on the gateways.
    type: str
    choices: [mesh, host, step]
    default: mesh
  before:
    description:
      - What worked before the change, C(standing) of M(isthmus.mesh.node). With O(scope=host) what worked then and does
        not now is a problem; what did not work then is none.
    type: dict
  wait:
    description:
      - Seconds within which everything must have become as it should be.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: The mesh does what the inventory says
  isthmus.mesh.verify:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    record: "{{ __plan_result.record }}"
    services: "{{ __plan_result.services[isthmus_cluster].present }}"
    hosts:
      - name: cloud-1
        cluster: cloud
        mesh4: 10.102.0.1
"""

RETURN = r"""
problems:
  description: Everything that is not as the inventory says; the module fails when there is something.
  returned: always
  type: list
  elements: str
unreached:
  description:
    - With O(scope=step) those of O(hosts) that are not reached natively, the first of each C(site), with C(cluster),
      C(name), and C(why). They are no RV(problems). C(sure) is false where nothing is known, since the tunnel does not
      lead there either.
    - Null when it could not be found out.
  returned: always
  type: list
  elements: dict
warnings_of_agent:
  description: What the agent reports that is no contradiction to the inventory.
  returned: always
  type: list
  elements: str
loss:
  description:
    - With O(scope=mesh), how many packets of full size were C(sent) to the other hosts, one every 20 ms to each, and by
      name how many to a host were C(lost), where some were. What is lost on the way to a host that answers is no
      problem of the inventory, and told in a warning.
    - Null when it was not measured.
  returned: always
  type: dict
  sample: {"sent": 100, "lost": {"edge-1": 3}}
proofs:
  description: How many facts were proven, by kind.
  returned: always
  type: dict
  sample:
    certificates: 7
    packets: 15
"""

import collections
import concurrent.futures
import contextlib
import datetime
import functools
import ipaddress
import itertools
import json
import os
import pathlib
import stat
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import (
    clock,
    etcd_trouble,
    etcd_unit,
    frr,
    packets,
    resolver,
    standing,
    strongswan,
    units,
)
from ansible_collections.isthmus.mesh.plugins.module_utils.files import read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import bgp, ipsec, openings
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.encryption import CHANGING, Stage
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.spec import IPSEC_PORTS
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module

SOCKET = pathlib.Path("/run/isthmus/agent.sock")
NODE = "/etc/isthmus/node.json"
PKI = "/etc/isthmus/pki"
TCP_PORT = 9  # discard: hardly anybody listens there, and a refusal is an answer too
RESOLVED = "systemd-resolved.service"
NATIVE_MARK = 0x4E  # the agent's rules lead packets with it natively while that is turned on or off
WHOLE_MARK = 0x4F  # the datapath lets nobody fragment the tunnel's packets around those with it
LOSS_PACKETS = 20  # to each host
LOSS_GAP = 0.02  # seconds between two of them
LOSS_MOST = 2000  # from a host; in a large mesh each other host gets fewer, but three at least
SESSION = 180  # seconds after which a session of WireGuard is over
SESSION_SECONDS = 7  # within which FRR tries to connect, so that it is seen why it cannot
FRESH = 30  # seconds after which a peer's proof is too old
PAUSE = 2  # seconds from one look to the next
SITE = "run the playbook isthmus.mesh.site"
PODS = "see `isthmus status` on both hosts, and whether a network policy forbids echoes"
BY_THE_NETWORK = (
    "The network between the hosts must route the ranges of workloads (`routers` of the plan has the routes), and let "
    "packets between them through"
)
THROUGH_WIREGUARD = (
    "It is to be reached so inside WireGuard: firewalls of the two hosts must let packets between the ranges of "
    "workloads in on its devices (docs/ports.md), and WireGuard must have a session between them"
)
PROBES = 3  # pods that are entered, one after the other, until everything was reached


class Verifier:
    """Collects problems; each method looks at one side of the host and ends early only when it can see no more."""

    def __init__(self, module):
        self.module = module
        self.spec = module.params["spec"]
        self.record = module.params["record"]
        self.services = module.params["services"]
        self.hosts = [host for host in module.params["hosts"] if host["name"] != self.spec["host"]]
        self.timeout = module.params["timeout"]
        self.cluster = self.spec["cluster"]["name"]
        self.reached = {host["cluster"] for host in module.params["hosts"]}
        self.problems = []
        self.loss = None
        self.remarks = []  # for who runs the playbook
        self.warnings = []
        self.unreached = None
        self.nodes = {}  # what the agent says of each, by cluster and name
        self.proofs = collections.Counter()

    def check(self, kind, good, problem):
        """One fact: counted when it is so, a problem when not."""
        if good:
            self.proofs[kind] += 1
        else:
            self.problems.append(f"{kind}: {problem}")
        return good

    def run(self):
        if self.module.params["scope"] == "host":
            self.run_host()
            return
        if self.module.params["scope"] == "step":
            self.look("encryption", self.check_changing)
            self.look("routing", self.check_native_way)
            self.look("gateways", self.check_gateway_way)
            if self.problems:  # a session may be why; one of several routers that is away is no reason to wait
                self.look("bgp", self.check_bgp)
            return
        self.look("clock", self.check_clock)
        self.look("units", self.check_units)
        self.look("spec", self.check_spec)
        self.look("certificates", self.check_certificates)
        if self.spec.get("member"):
            self.look("etcd", self.check_etcd)
            self.look("etcd", self.check_revoked)
        status = self.look("agent", self.check_agent)
        if status is not None:
            self.look("services", self.check_services, status)
            self.look("peers", self.check_peers)
            if (self.spec.get("registrar") or {}).get("kubernetes"):
                self.look("kubernetes", self.check_kubernetes)
            self.look("pods", self.check_pods)
        self.look("packets", self.check_packets)
        if status is not None and self.spec.get("wireguard"):
            self.look("encryption", self.check_encrypted)
        if status is not None and self.spec.get("native"):
            self.look("routing", self.check_native)
        if self.spec.get("ipsec"):
            self.look("gateways", self.check_gateways)
            if status is not None:
                self.look("gateways", self.check_led, status)
        self.look("bgp", self.check_bgp)
        self.look("packets", self.measure_loss)

    def run_host(self):
        """By the specification on the host: a run with tags may have brought no newer one."""
        try:
            installed = json.loads(read(NODE))
        except FileNotFoundError:
            return  # such a run on a new host: nothing works here that could be looked at
        if not self.spec.get("member"):
            installed["member"] = None
        self.spec = installed
        self.look("units", self.check_units)
        if self.spec.get("member"):
            self.look("etcd", self.check_own_member)
            self.look("etcd", self.check_revoked)
        self.look("agent", self.check_own_agent)

    def look(self, kind, method, *arguments):
        """One side of the host. What nobody thought of on it must not hide what the other sides show."""
        try:
            return method(*arguments)
        except Exception as exc:
            self.check(kind, False, f"this could not be looked at to the end: {type(exc).__name__}: {exc}; {SITE}")
            return None

    def check_clock(self):
        told = self.module.params["controller_time"]
        if told:
            problem = clock.problem(told, self.module.params["max_clock_skew"])
            self.check("clock", not problem, problem)

    def check_units(self):
        names = ["isthmusd.service", "isthmus-dns.service", "isthmus-dns-reload.path"]
        if self.spec.get("registrar"):
            names.append("isthmus-registrar.service")
        if self.spec.get("member"):
            names.append("isthmus-etcd.service")
        names += [name for name in units.WIREGUARD if os.path.exists(units.Units.path(name))]
        gateways = self.spec.get("ipsec") or {"far": {}}
        if gateways.get("connections"):
            names.append(strongswan.UNIT)
        if ipsec.guard(gateways) is not None:
            names.append(strongswan.GUARD_UNIT)
        for name, found in units.Systemd(self.module).show(names).items():
            state = found.get("ActiveState")
            self.check(
                "units",
                state == "active",
                f"{name} is {state}; see `journalctl -u {name}` on {self.spec['host']}, or {SITE}",
            )
            enabled = found.get("UnitFileState") == "enabled"
            self.check("units", enabled, f"{name} would not start at the next boot; {SITE}")

    def check_spec(self):
        try:
            with open(NODE, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError) as exc:
            self.check("spec", False, f"{NODE} cannot be read: {exc}; {SITE}")
            return
        if not isinstance(found, dict):
            self.check("spec", False, f"{NODE} is no specification: it holds a {type(found).__name__}; {SITE}")
            return
        differing = sorted(key for key in {*found, *self.spec} if found.get(key) != self.spec.get(key))
        self.check(
            "spec",
            not differing,
            f"{NODE} is not what the inventory gives ({', '.join(differing)} differ); {SITE}",
        )

    def check_certificates(self):
        pki = bundle_module(self.module, "isthmus_agent.pki")
        now = datetime.datetime.now(datetime.timezone.utc)
        for cluster in self.spec["pki"]["trust"]:
            path = f"{PKI}/trust/{cluster}.crt"
            try:
                pki.check_pin(read(path), path, now)
            except FileNotFoundError:
                self.check("certificates", False, f"{path}, the authority of cluster {cluster}, is missing; {SITE}")
            except pki.PkiError as exc:
                self.check("certificates", False, f"{exc}")
            else:
                self.proofs["certificates"] += 1
        for entry in self.spec["pki"]["certificates"]:
            path = f"{PKI}/{entry['name']}"
            trusted = f"{PKI}/trust/{entry['ca_cluster']}.crt"
            key, certificate, authority = (read_or_none(name) for name in (path + ".key", path + ".crt", trusted))
            try:
                reason = pki.renewal_reason(
                    pki.CertificateSpec.from_dict(entry),
                    None if key is None else key.encode(),
                    None if certificate is None else certificate.encode(),
                    authority,
                    now,
                )
            except pki.PkiError as exc:
                reason = f"it cannot be compared with its authority {trusted}: {exc}"
            self.check("certificates", reason is None, f"{path}.crt: {reason}; {SITE}")
            if key is not None:
                mode = stat.S_IMODE(os.stat(path + ".key").st_mode)
                self.check("certificates", mode == 0o600, f"{path}.key has mode {mode:04o}, not 0600; {SITE}")

    def check_etcd(self):
        admin = bundle_module(self.module, "isthmus_agent.etcd_admin")
        client_module = bundle_module(self.module, "isthmus_agent.kvstore.client")
        errors = bundle_module(self.module, "isthmus_agent.kvstore.errors")
        spec = bundle_module(self.module, "isthmus_mesh.spec").NodeSpec.from_dict(self.spec)
        member = spec.member
        endpoint = admin.local_endpoint(member)
        restart = "see `journalctl -u isthmus-etcd` there"
        try:
            connect = admin.EtcdConnector(self.cluster, directory=PKI)
            with connect([endpoint], timeout=self.timeout) as client:
                status = client.status()
                members = client.member_list()
                alarms = client.alarms()
                enabled = client.auth_status()
                self.check_published(client)
                for entry in members:
                    for url in entry.client_urls[:1]:
                        with connect([url], timeout=self.timeout) as other:
                            self.check_answers(other, entry, errors)
        except (errors.EtcdError, OSError) as exc:
            self.check("etcd", False, f"member {member.name} does not serve: {exc}. {self.why_not(admin, member)}")
            return
        declared = {url.rstrip("/") for url in member.members.values()}
        real = {url.rstrip("/") for entry in members for url in entry.peer_urls}
        self.check("etcd", declared == real, f"its members are {sorted(real)}, the plan has {sorted(declared)}; {SITE}")
        learners = [entry.name or entry.peer_urls[0] for entry in members if entry.learner]
        self.check("etcd", not learners, f"members do not vote yet: {', '.join(learners)}; {SITE}")
        self.check("etcd", not alarms, f"alarm {etcd_trouble.of_alarms(alarm for _member, alarm in alarms)}")
        self.check("etcd", not status.errors, f"{member.name} reports {', '.join(status.errors)}; {restart}")
        self.check("etcd", enabled, f"access control is off, every certificate may write everything; {SITE}")
        self.check_rights(endpoint, client_module, errors)

    def why_not(self, admin, member):
        """Why the member on this host does not serve, and what to do."""
        others = admin.other_endpoints(member)
        journal = units.Systemd(self.module).journal("isthmus-etcd.service", etcd_trouble.JOURNAL_LINES)
        why = etcd_trouble.of_host(self.cluster, not others, journal)
        if not why and others:
            connect = admin.EtcdConnector(self.cluster, directory=PKI)
            why = etcd_trouble.of_others(self.cluster, admin.survey(member, connect, self.timeout).describe())
        return why or "Next: see `journalctl -u isthmus-etcd` there"

    def check_own_member(self):
        """It serves, has a leader and votes. How the others are is no finding about this host."""
        admin = bundle_module(self.module, "isthmus_agent.etcd_admin")
        errors = bundle_module(self.module, "isthmus_agent.kvstore.errors")
        member = bundle_module(self.module, "isthmus_mesh.spec").NodeSpec.from_dict(self.spec).member
        words = "see `journalctl -u isthmus-etcd` there"
        try:
            connect = admin.EtcdConnector(self.cluster, directory=PKI)
            with connect([admin.local_endpoint(member)], timeout=self.timeout) as client:
                own = [entry for entry in client.member_list() if entry.name == member.name]
        except (errors.EtcdError, OSError) as exc:
            self.check("etcd", False, f"member {member.name} does not serve: {exc}; {words}")
            return
        self.check("etcd", own and not own[0].learner, f"member {member.name} does not vote; {words}")

    def check_own_agent(self):
        agent = bundle_module(self.module, "isthmus_agent.cli.client")
        try:
            status, services, audit = (agent.ask(SOCKET, f"/v1/{what}") for what in ("status", "services", "audit"))
        except agent.AgentSilent as exc:
            self.check("agent", False, f"{exc}")
            return
        datapath = status["datapath"]
        self.check("agent", datapath["state"] == "applied", f"its datapath is {datapath['state']}: {datapath['error']}")
        words = f"it runs with another specification than {NODE}; see `journalctl -u isthmusd` there"
        self.check("agent", status["spec_hash"] == self.spec["hash"], words)
        before = self.module.params["before"]
        if not before:
            return
        self.problems += standing.worse(before, status, services, audit)
        found = {f"{one['namespace']}/{one['name']}": one for one in services["services"]}
        server = self.name_server()
        for service in self.services:
            name = f"{service['namespace']}/{service['name']}"
            one = found.get(name)
            if name not in before["services"] or one is None or not one["address"]:
                continue
            self.check_names(one, server)
            # Without a health check nobody knows whether a backend listens at all.
            health = service.get("health") or {}
            ports = [port for port in service["ports"] if health and health.get("port") in (None, port["target_port"])]
            self.check_requests({**service, "ports": ports}, one)

    def check_revoked(self):
        """etcd refuses what is in this file, whatever the record says."""
        known = self.record.get(f"clusters/{self.cluster}", {}).get("crl")
        if known is None:
            return
        path = f"{PKI}/{etcd_unit.REVOKED}"
        problem = bundle_module(self.module, "isthmus_agent.revocation").outdated(read_bytes(path), known)
        self.check("etcd", not problem, f"{path}: {problem}; {SITE}")
        settings = etcd_unit.settings((read_bytes(etcd_unit.ENVIRONMENT) or b"").decode(errors="replace"))
        listed = all(settings.get(name) == path for name in ("ETCD_CLIENT_CRL_FILE", "ETCD_PEER_CRL_FILE"))
        self.check("etcd", listed, f"{etcd_unit.ENVIRONMENT} does not tell etcd to read {path}; {SITE}")

    def check_answers(self, client, entry, errors):
        try:
            client.status(timeout=self.timeout)
        except errors.EtcdError as exc:
            name = entry.name or entry.peer_urls[0]
            words = f"`systemctl start isthmus-etcd` there; when its data is lost, {SITE}, and it joins anew; when its "
            words += f"host is gone for good, run it with -e isthmus_prune=member/{self.cluster}/{name}"
            self.check("etcd", False, f"member {name} does not answer: {exc.reason}. Next: {words}")
        else:
            self.proofs["etcd"] += 1

    def check_rights(self, endpoint, client_module, errors):
        """With the agent's certificate a key of another writer cannot be written. The transaction's condition never
        holds, so nothing is written even when access control is broken; etcd checks rights before conditions."""
        sync = bundle_module(self.module, "isthmus_agent.kvstore.sync")
        keys = bundle_module(self.module, "isthmus_mesh.keys")
        etcd = self.spec["etcd"]
        foreign = keys.service_definition_key("isthmus-verify", "forbidden")
        never = client_module.Compare(foreign, "version", ">", 2**62)
        try:
            with sync.SyncEtcd([endpoint], etcd["ca"], etcd["cert"], etcd["key"], timeout=self.timeout) as client:
                client.txn([never], [client_module.Put(foreign, "")], [])
        except errors.EtcdError as exc:
            self.check("etcd", "permission" in str(exc).lower(), f"the agent's certificate is not usable: {exc}")
        except OSError as exc:
            self.check("etcd", False, f"the agent's certificate is not usable: {exc}; {SITE}")
        else:
            self.check("etcd", False, f"an agent may write {foreign}; its role has too many rights; {SITE}")

    def check_published(self, client):
        """What peers and agents read: the record, definitions, nodes, and the mirror of every peer that we reach."""
        keys = bundle_module(self.module, "isthmus_mesh.keys")
        for name, document in self.record.items():
            key = keys.ROSTER if name == "roster" else keys.estate_cluster_key(name.split("/", 1)[1])
            found = client.get(key)
            try:
                revision = None if found is None else json.loads(found.value)["revision"]
            except (ValueError, TypeError, KeyError):
                self.check("etcd", False, f"{key} is damaged: it is no document with a revision; {SITE}")
                continue
            self.check(
                "etcd",
                revision == document["revision"],
                f"{key} has revision {revision}, not {document['revision']}; {SITE}",
            )
        for service in self.services:
            key = keys.service_definition_key(service["namespace"], service["name"])
            self.check("etcd", client.get(key) is not None, f"{key}, a service of the inventory, is missing; {SITE}")
        registrar = "see `journalctl -u isthmus-registrar` on the etcd hosts of "
        for host in self.module.params["hosts"]:
            own = host["cluster"] == self.cluster
            key = keys.node_key(host["cluster"], host["name"], cached=not own)
            what = f"{host['name']} is not {'published' if own else 'mirrored'}"
            words = f"{key} is missing: {what}; {registrar}{self.cluster}"
            self.check("etcd", client.get(key) is not None, words)

    def check_agent(self):
        agent = bundle_module(self.module, "isthmus_agent.cli.client")
        try:
            status = agent.ask(SOCKET, "/v1/status")
            audit = agent.ask(SOCKET, "/v1/audit")
        except agent.AgentSilent as exc:
            self.check("agent", False, f"{exc}")
            return None
        datapath = status["datapath"]
        self.check("agent", datapath["state"] == "applied", f"its datapath is {datapath['state']}: {datapath['error']}")
        same = status["spec_hash"] == self.spec["hash"]
        self.check("agent", same, f"it runs with another specification than planned; {SITE}")
        self.check("agent", status["etcd"]["connected"], f"it has no connection to etcd: {status['etcd']['error']}")
        self.check("agent", status["reports"]["error"] is None, f"it cannot report: {status['reports']['error']}")
        self.warnings = status["warnings"]
        if self.check("datapath", not audit["problems"], "the kernel is not as the agent wants it"):
            return status
        self.problems.pop()
        self.problems += [f"datapath: {words}" for words in audit["problems"]]
        return status

    def check_services(self, status):
        agent = bundle_module(self.module, "isthmus_agent.cli.client")
        found = {(one["namespace"], one["name"]): one for one in agent.ask(SOCKET, "/v1/services")["services"]}
        for workload in status["workloads"]:
            for service, backend in workload["services"].items():
                self.check(
                    "backends",
                    backend["ready"],
                    f"{workload['namespace']}/{workload['name']} on {self.spec['host']} is no backend of {service}: "
                    f"{backend['reason']}",
                )
        server = self.name_server()
        for service in self.services:
            name = f"{service['namespace']}/{service['name']}"
            one = found.get((service["namespace"], service["name"]))
            if not self.check("services", one is not None, f"{name} is not known here; is the registrar running?"):
                continue
            if self.check("services", one["address"], f"{name} has no address yet; is the registrar running?"):
                self.check_names(one, server)
                self.check_requests(service, one)

    def name_server(self):
        """Where this host's dnsmasq answers."""
        resolved = units.Systemd(self.module).show([RESOLVED])[RESOLVED].get("ActiveState") == "active"
        return resolver.server(resolver.probe(resolved), self.spec["node"]["mesh4"])

    def check_names(self, service, server):
        name, address = service["dns"], service["address"]
        try:
            code, found = packets.query(server, name, "A", self.timeout)
            self.check("names", found == [address], f"{name} is {found or 'unknown'} at {server}, not {address}")
            code, found = packets.query(server, name, "AAAA", self.timeout)
            self.check("names", (code, found) == (0, []), f"{name} has AAAA {found} (code {code}) at {server}")
        except packets.NoAnswer as exc:
            self.check("names", False, f"{name}: {exc}; see `journalctl -u isthmus-dns`")
        code, out, _err = self.module.run_command(["getent", "ahostsv4", name])
        found = sorted({line.split()[0] for line in out.splitlines() if line.split()})
        words = f"the host's own resolver says {found or 'nothing'} for {name}, not {address}; {SITE}"
        self.check("names", found == [address], words)

    def check_requests(self, service, found):
        """One request to every TCP port of a service that has a backend."""
        usable = [one for one in found["backends"] if one["used"]]
        name = f"{service['namespace']}/{service['name']}"
        if not usable:
            self.warnings.append(f"service {name} has no backend that could answer, so no request was made")
            return
        health = service.get("health") or {}
        for port in service["ports"]:
            if port["protocol"] != "TCP":
                continue
            asked = (found["dns"], health.get("path") or "/") if health.get("type") == "http" else None
            if asked and health.get("port") not in (None, port["target_port"]):
                asked = None
            try:
                packets.request(found["address"], port["port"], self.timeout, asked)
            except packets.NoAnswer as exc:
                words = f"{name} at {found['address']}:{port['port']} does not answer: {exc} ({len(usable)} backends)"
                self.check("services", False, words)
            else:
                self.proofs["services"] += 1

    def check_peers(self):
        agent = bundle_module(self.module, "isthmus_agent.cli.client")
        for peer in agent.ask(SOCKET, "/v1/peers")["peers"]:
            if peer["name"] not in self.reached:
                continue
            good = peer["state"] == "connected" and peer["age"] is not None and peer["age"] <= FRESH
            words = f"{peer['name']} is {peer['state']}, the last proof is {peer['age']} s old"
            self.check(
                "peers", good, f"{words}; see `journalctl -u isthmus-registrar` on the etcd hosts of {self.cluster}"
            )

    def sites(self):
        """The site of every other host of the record, by cluster and name."""
        return {
            (cluster, name): entry["site"]
            for cluster, document in openings.documents_of(self.record).items()
            for name, entry in document["hosts"].items()
            if name != self.spec["host"]
        }

    def ask(self):
        return bundle_module(self.module, "isthmus_agent.cli.client").ask(SOCKET, "/v1/status")

    def ask_encryption(self):
        """What the agent says of each node, by cluster and name."""
        status = self.ask()
        return {(one["cluster"], one["name"]): one for one in status["nodes"]}, status["wireguard"]

    def check_encrypted(self):
        """After packets to all hosts: each that is to be encrypted has a session, and none is on its way."""
        nodes, wireguard = self.ask_encryption()
        wanted = openings.devices(self.spec)
        programs = " ".join(unit for unit, device in units.WIREGUARD.items() if device in wanted)
        words = f"WireGuard is not there; see `systemctl status {programs}`"
        self.check("encryption", wireguard and wireguard["implementation"], words)
        reached = {(host["cluster"], host["name"]) for host in self.hosts}
        for key, site in sorted(self.sites().items()):
            stage = openings.encrypts(self.spec, site)
            if stage is Stage.PLAIN or key not in reached:
                continue
            found = nodes.get(key, {}).get("encryption") or {"state": "not known", "reason": None}
            why = f": {found['reason']}" if found["reason"] else ""
            if found["state"] == "idle" and openings.is_one_sided(self.spec, site):
                why = f" ({openings.asked(self.spec, site, self.spec['wireguard']['port'])})"
            good = found["state"] == "encrypted" and stage is Stage.DEMANDS
            turned = f"it is being turned on or off ({stage.word})" if stage.word in CHANGING else "it should be"
            self.check(
                "encryption",
                good,
                f"traffic with {key[1]} of cluster {key[0]} (site {site}) is not encrypted as the inventory says: "
                f"{turned}, and is {found['state']}{why}; {SITE}, and see `isthmus status` on both hosts",
            )

    def check_changing(self):
        """A session with each host of the sites with which encryption is being turned on; while keys are replaced, with
        each host that packets to are encrypted, by both devices."""
        with open(NODE, encoding="utf-8") as file:
            installed = json.load(file)
        devices = openings.devices(installed)
        stages = (Stage.ACCEPTS, Stage.SENDS) if len(devices) == 1 else tuple(Stage)[1:]
        expected = {
            key: site for key, site in sorted(self.sites().items()) if openings.encrypts(installed, site) in stages
        }
        nodes, _wireguard = self.ask_encryption()
        wireguard = bundle_module(self.module, "isthmus_agent.netlink.wireguard")
        endpoints = [nodes[key]["endpoint"] for key in expected if nodes.get(key, {}).get("endpoint")]
        for device in devices:
            wireguard.greet(installed["node"]["underlay4"], endpoints, installed["overlay"]["port"], device)
        time.sleep(PAUSE / 4)  # for answers
        nodes, _wireguard = self.ask_encryption()
        for (cluster, name), site in expected.items():
            found = nodes.get((cluster, name), {}).get("encryption") or {}
            for number, tunnel in enumerate(openings.tunnels(installed)):
                one = (found.get("second") if number else found) or {"reason": "its node is not published yet"}
                age = one.get("handshake_age")
                why = (
                    one["reason"] or f"WireGuard has no answer of it; {openings.asked(installed, site, tunnel['port'])}"
                )
                self.check(
                    "encryption",
                    not one["reason"] and age is not None and age < SESSION,
                    f"{name} of cluster {cluster} (site {site}) is not reached through WireGuard: {why}",
                )

    def check_kubernetes(self):
        """The registrar follows the API server, and everything there has its place in the mesh."""
        agent = bundle_module(self.module, "isthmus_agent.cli.client")
        api = agent.ask(SOCKET, "/v1/peers")["kubernetes"]
        journal = f"see `journalctl -u isthmus-registrar` on the etcd hosts of {self.cluster}"
        if not self.check("kubernetes", api is not None, f"no registrar has told of the API server yet; {journal}"):
            return
        self.check(
            "kubernetes",
            api["state"] == "connected",
            f"the API server {api['server']} is {api['state']} since {api['since']} ({api['error'] or 'no reason'}): "
            f"what was published stands, nothing newer comes; {journal}",
        )
        for words in api["problems"]:
            self.check("kubernetes", False, words)

    def check_pods(self):
        """Pods of every other node answer this host. On a node what is published of its pods is what is there, and one
        of them, whose network namespace is entered for it, reaches every host and the pods of other clusters. Nothing
        is made, so nothing is left behind."""
        agent = bundle_module(self.module, "isthmus_agent.cli.client")
        told = agent.ask(SOCKET, "/v1/pods")
        asked = {(host["cluster"], host["name"]) for host in self.hosts}
        others = [one for one in told["others"] if (one["cluster"], one["node"]) in asked]
        targets = {f"a pod on {one['node']} ({', '.join(one['addresses'])})": one["addresses"] for one in others}
        silent = self.silent(self.spec["node"]["mesh4"], targets)
        for target in targets:
            self.check(
                "pods", target not in silent, f"{target} does not answer this host: {silent.get(target)}; {PODS}"
            )
        if told["pods"] is None:
            return
        namespaces = bundle_module(self.module, "isthmus_agent.netlink.namespaces")
        there = self.check_pods_here(agent, namespaces, told)
        targets = {f"{host['name']} ({host['mesh4']})": [host["mesh4"]] for host in self.hosts}
        for one in others:
            if one["cluster"] != self.cluster:
                targets[f"a pod on {one['node']} ({', '.join(one['addresses'])})"] = one["addresses"]
        probes = [(one["address"], there[one["address"]]) for one in told["pods"] if one["address"] in there][:PROBES]
        if not probes:
            self.warnings.append(f"no pod runs on {self.spec['host']}, so none was asked what it reaches")
            return
        left = targets
        for address, path in probes:
            silent = namespaces.inside(path, functools.partial(self.silent, address, left))
            # None: the pod has ended meanwhile.
            left = {target: left[target] for target in (left if silent is None else silent)}
        for target in targets:
            words = f"{target} does not answer pods of this node ({', '.join(address for address, _path in probes)})"
            self.check("pods", target not in left, f"{words}; {PODS}")

    def check_pods_here(self, agent, namespaces, told):
        """Where each pod's address is: address -> network namespace. Pods come and go, so that a difference counts when
        it is there twice."""
        differences = None
        while True:
            there = {
                address: path
                for path in namespaces.paths()
                for address in namespaces.inside(path, namespaces.addresses_here) or ()
            }
            ranges = [ipaddress.ip_network(text) for text in told["ranges"]]
            published = {one["address"]: one["name"] for one in told["pods"]}
            real = {address for address in there if any(ipaddress.ip_address(address) in each for each in ranges)}
            found = {
                address: f"{address} ({published[address]}) is published, and no pod of this node has it"
                for address in published.keys() - real
            }
            for address in real - published.keys():
                found[address] = f"{address} is a pod's on this node and is not published, so the pod is cut off"
            again = differences is not None
            differences = (
                found if not again else {address: found[address] for address in found if address in differences}
            )
            if again or not differences:
                break
            time.sleep(PAUSE)
            told = agent.ask(SOCKET, "/v1/pods")
        for address in sorted(published.keys() | differences.keys()):
            words = f"{differences.get(address)}; see `isthmus peers` here, and `journalctl -u isthmus-registrar` on "
            self.check("pods", address not in differences, f"{words}the etcd hosts of {self.cluster}")
        return there

    def silent(self, source, targets):
        """What does not answer an echo from an address of this network namespace: target -> how. Of several addresses
        of a target one is enough."""
        with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
            asked = {target: pool.submit(self.echoed, source, addresses) for target, addresses in targets.items()}
            return {target: future.result() for target, future in asked.items() if future.result()}

    def echoed(self, source, addresses):
        """Empty when one of the addresses answers packets of full size, else what happened to the last."""
        words = ""
        for address in addresses:
            # A pod learns what the path allows from its first packet that is too large.
            for _attempt in range(2):
                try:
                    packets.echo(source, address, packets.path_mtu(source, address), self.timeout / 3)
                    return ""
                except (packets.NoAnswer, OSError) as exc:
                    words = f"{exc}"
        return words

    def check_native(self):
        """Each host that is to be reached natively is, and the way carries what the underlays on both sides do, with
        WireGuard less what that needs. Packets of full size that are answered were inside WireGuard where they have to
        be: the programs on both sides drop others."""
        source = self.spec["node"]["mesh4"]
        nodes = {(one["cluster"], one["name"]): one for one in self.ask()["nodes"]}
        reached = {(host["cluster"], host["name"]): host["mesh4"] for host in self.hosts}
        sites = {key: site for key, site in sorted(self.sites().items()) if key in reached}
        sites = {key: site for key, site in sites.items() if openings.native(self.spec, site) is not Stage.PLAIN}
        silent = self.silent(source, {key: [reached[key]] for key in sites})
        for key, site in sites.items():
            stage = openings.native(self.spec, site)
            name = f"{key[1]} of cluster {key[0]} (site {site})"
            found = nodes.get(key, {}).get("routing") or {"way": "not known", "stage": Stage.PLAIN.word, "mtu": 0}
            turned = f"it is being turned on or off ({stage.word})" if stage.word in CHANGING else "it should be"
            if self.check(
                "routing",
                found["stage"] == stage.word == Stage.DEMANDS.word,
                f"packets to {name} do not go natively as the inventory says: {turned}, and the way is {found['way']} "
                f"({found['stage']}); {SITE}, and see `isthmus status` on both hosts",
            ):
                self.check(
                    "routing",
                    key not in silent,
                    f"{name} is not reached natively: {silent.get(key)}. "
                    + (
                        f"{THROUGH_WIREGUARD}, which `isthmus status` on both shows"
                        if openings.encrypts(self.spec, site) is Stage.DEMANDS
                        else f"{BY_THE_NETWORK}; where routing is auto, isthmus.mesh.site leads packets back into the "
                        "tunnel"
                    ),
                )
                carried = packets.path_mtu(source, reached[key])
                self.check(
                    "routing",
                    carried >= found["mtu"],
                    f"the way to {name} carries only {carried} bytes, and the devices at both ends {found['mtu']}: a "
                    "router in between has said so. Give its links the MTU of the hosts, or the hosts the link's",
                )

    def check_native_way(self):
        """A packet of full size that goes natively, to each host of the sites with which that is being turned on, or is
        asked for."""
        with open(NODE, encoding="utf-8") as file:
            installed = json.load(file)
        source = installed["node"]["mesh4"]
        places = {
            (cluster, name): entry["mesh4"]
            for cluster, document in openings.documents_of(self.record).items()
            for name, entry in document["hosts"].items()
        }
        tried = {(host["cluster"], host["name"]) for host in self.hosts}
        expected = {
            key: site
            for key, site in sorted(self.sites().items())
            if openings.native(installed, site) in (Stage.ACCEPTS, Stage.SENDS) or key in tried
        }
        unreached = []
        with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
            asked = {
                key: pool.submit(self.try_natively, openings.native(installed, site), source, places[key])
                for key, site in expected.items()
            }
            for (cluster, name), site in expected.items():
                words, sure = asked[cluster, name].result()
                if (cluster, name) in tried:
                    found = {"cluster": cluster, "name": name, "site": site, "why": words, "sure": sure}
                    unreached += [found] if words else []
                    continue
                self.check(
                    "routing",
                    not words,
                    f"{name} of cluster {cluster} (site {site}) is not reached natively: {words}. "
                    + (THROUGH_WIREGUARD if openings.encrypts(installed, site) is Stage.DEMANDS else BY_THE_NETWORK),
                )
        # One of each site tells enough, and rather one that tells something.
        unreached.sort(key=lambda one: (one["site"], not one["sure"]))
        self.unreached = [next(of_site) for _site, of_site in itertools.groupby(unreached, lambda one: one["site"])]

    def try_natively(self, stage, source, target):
        """Why a host is not reached natively, empty when it is, and whether that is sure: while packets go through the
        tunnel it is known that something else than the host or the line to it is why."""
        if stage is Stage.PLAIN:
            return "packets to it are not led natively yet", False
        words = self.reach_natively(source, target)
        return words, not words or stage is not Stage.ACCEPTS or not self.echoed(source, [target])

    def reach_natively(self, source, target):
        try:
            size = packets.path_mtu(source, target, NATIVE_MARK)
            packets.echo(source, target, size, self.timeout / 3, mark=NATIVE_MARK)
        except (packets.NoAnswer, OSError) as exc:
            return str(exc)
        return ""

    def check_gateways(self):
        """A gateway has its tunnels, and on every host nothing goes beside them."""
        own = self.spec["ipsec"]
        self.check_tunnels(own.get("connections", []))
        for site, entry in sorted(own["far"].items()):
            self.check(
                "gateways",
                entry["stage"] == Stage.DEMANDS.word,
                f"packets to site {site} do not all go through the gateways yet: it is being turned on or off "
                f"({entry['stage']}); {SITE}",
            )
        wanted = ipsec.guard(own)
        self.check(
            "gateways",
            wanted is None or strongswan.guard_in_kernel(self.module) == strongswan.guard_rules(wanted),
            f"the rules that keep packets from other ways than the gateways' (`nft list table ip {ipsec.GUARD}`) are "
            f"not what the inventory gives; {SITE}",
        )

    def check_led(self, status):
        """Of two gateways both are there; one whose tunnels pass nothing is of no use."""
        found = status.get("gateways") or {"gateways": [], "tunnels": None}
        for one in found["gateways"]:
            self.check(
                "gateways",
                one["state"] != "down",
                f"gateway {one['host']} ({one['address']}) of this site does not answer {self.spec['host']}, so "
                f"{'nothing reaches the sites behind gateways' if found['lost'] else 'there is no second one'}; see "
                f"`isthmus status` here, and whether {one['host']} runs",
            )
        for site, passing in sorted((found["tunnels"] or {}).items()):
            self.check(
                "gateways",
                passing is not False,
                f"nothing passes through the tunnels of this gateway to site {site}: no gateway there answers in them; "
                f"see `swanctl --list-sas` and `journalctl -u {strongswan.UNIT}`",
            )

    def check_gateway_way(self):
        """A gateway's tunnels to the sites with which they are being turned on, as it is configured now."""
        with open(NODE, encoding="utf-8") as file:
            own = json.load(file).get("ipsec") or {"far": {}}
        changing = {site for site, entry in own["far"].items() if entry["stage"] in CHANGING}
        self.check_tunnels([one for one in own.get("connections", []) if one["site"] in changing])

    def check_tunnels(self, connections):
        """They are there, and packets of full size pass to the other gateway, where that is one of ours."""
        missing = strongswan.missing(self.module, connections) if connections else {}
        for one in connections:
            why = missing.get(ipsec.name_of(one))
            name = f"the tunnel to the gateway of site {one['site']} ({one['remote']})"
            if not self.check(
                "gateways",
                why is None,
                f"{name} is not there: {why}. UDP {' and '.join(str(port) for port in IPSEC_PORTS)} must be open "
                f"between the two gateways both ways; see `journalctl -u {strongswan.UNIT}` on both",
            ):
                continue
            if "inside" in one and any(ipaddress.ip_address(one["inside"]) in network for network in networks_of(one)):
                words = self.reach_gateway(one["local"], one["inside"])
                self.check(
                    "gateways", not words, f"{name} is there, and the other gateway does not answer in it: {words}"
                )

    def reach_gateway(self, source, target):
        try:
            packets.echo(source, target, packets.path_mtu(source, target), self.timeout / 3)
        except (packets.NoAnswer, OSError) as exc:
            return str(exc)
        return ""

    def check_bgp(self):
        """A session with each router, which was told this host's range. What no router sends is told only: one may send
        its servers a default route, which is not taken."""
        own = self.module.params["bgp"]
        if not own or own.get("kept"):
            return
        lacking = frr.await_sessions(self.module, own, SESSION_SECONDS)
        announced = self.spec["node"]["range4"]
        received = []
        for address in (router["address"] for router in own["routers"]):
            if not self.check(
                "bgp",
                address not in lacking,
                f"there is no session with router {address}: {lacking.get(address)}; `bgp` of the plan has what to set "
                f"there, `vtysh -c 'show bgp neighbors {address}'` what FRR knows",
            ):
                continue
            sent = frr.routes(self.module, address, "advertised-routes")
            self.check("bgp", announced in sent, f"router {address} is not sent {announced}, but {sent}; {SITE}")
            received += frr.routes(self.module, address, "routes")
        wanted = openings.native_sources(self.spec, self.record, outside=True)
        unknown = bgp.uncovered(wanted, received)
        if unknown and len(lacking) < len(own["routers"]):
            self.warnings.append(
                f"no router sends {self.spec['host']} a route to {', '.join(unknown[:5])}"
                f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}: it may have none, or keep it to itself"
            )

    def check_packets(self):
        source = self.spec["node"]["mesh4"]
        with contextlib.suppress(Exception):  # an agent that does not answer is told elsewhere
            self.nodes = {(one["cluster"], one["name"]): one for one in self.ask()["nodes"]}
        with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
            asked = {host["name"]: pool.submit(self.reach, source, host) for host in self.hosts}
            for host in self.hosts:
                target = f"{host['name']} ({host['mesh4']})"
                for words in asked[host["name"]].result():
                    self.check("packets", not words, f"{target}: {words}; see `isthmus status` on both hosts")

    def measure_loss(self):
        source = self.spec["node"]["mesh4"]
        sizes = {}
        for host in self.hosts:
            with contextlib.suppress(OSError):  # no way there, which `check_packets` has told
                sizes[host["mesh4"]] = packets.path_mtu(source, host["mesh4"])
        if not sizes:
            return
        count = max(3, min(LOSS_PACKETS, LOSS_MOST // len(sizes)))
        lost = packets.lost(source, sizes, count, LOSS_GAP, self.timeout / 3)
        names = {host["mesh4"]: host["name"] for host in self.hosts}
        self.loss = {"sent": count * len(sizes), "lost": {names[each]: lost[each] for each in sizes if lost[each]}}
        some = [f"{name} {number} of {count}" for name, number in self.loss["lost"].items() if number < count]
        more = f" and {len(some) - 5} more" if len(some) > 5 else ""
        if some:
            self.remarks.append(
                f"packets of full size from {self.spec['host']} are lost on the way, or their answers are: to "
                f"{', '.join(some[:5])}{more}. The network between the hosts drops them, or one of these hosts is "
                "overloaded"
            )

    def reach(self, source, host):
        """Empty text for each thing that works: a small packet, one of full size, a packet of TCP."""
        target, results = host["mesh4"], []
        known = self.nodes.get((host["cluster"], host["name"]), {})
        try:
            packets.echo(source, target, 84, self.timeout / 3)
            results.append("")
        except (packets.NoAnswer, OSError) as exc:
            words = f"an echo over the overlay: {exc}"
            if known.get("deaf"):
                words += (
                    f". The way is cut in one direction: {host['name']} does not hear {self.spec['host']}, "
                    f"{self.spec['host']} hears {host['name']}"
                )
            results.append(words)
        results.append(self.reach_whole(source, target, known.get("routing") or {}))
        try:
            packets.knock(target, TCP_PORT, self.timeout)
            results.append("")
        except packets.NoAnswer as exc:
            results.append(f"TCP over the overlay: {exc}")
        return results

    def reach_whole(self, source, target, way):
        """Why a packet as large as the routes allow does not pass without being fragmented, empty when it does. `way`:
        what the agent says of it."""
        try:
            carried = packets.path_mtu(source, target)
            full = way.get("mtu") or carried
            if carried < full:
                return (
                    f"the way carries only {carried} bytes, and routes {full}: a router in between has said so. Give "
                    "its links the MTU of the hosts, or the hosts the link's"
                )
            packets.echo(source, target, full, self.timeout / 3, mark=WHOLE_MARK)
        except (packets.NoAnswer, OSError) as exc:
            found = way.get("path_mtu")
            more = f" (the agent found that the way carries {found})" if found is not None and way.get("lost") else ""
            return f"an echo of full size over the overlay, not to be fragmented: {exc}{more}"
        return ""


def networks_of(connection):
    """What lies behind the other gateway."""
    return [ipaddress.ip_network(text) for text in connection["remote_networks"]]


def read(path):
    # A damaged file is to be named as such, whatever bytes are in it.
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def read_or_none(path):
    with contextlib.suppress(FileNotFoundError):
        return read(path)
    return None


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "record": {"type": "dict", "required": True},
            "services": {"type": "list", "elements": "dict", "required": True},
            "hosts": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "cluster": {"type": "str", "required": True},
                    "mesh4": {"type": "str", "required": True},
                },
            },
            "bgp": {"type": "dict"},
            "controller_time": {"type": "str"},
            "max_clock_skew": {"type": "int", "default": 120},
            "timeout": {"type": "int", "default": 3},
            "scope": {"type": "str", "choices": ["mesh", "host", "step"], "default": "mesh"},
            "before": {"type": "dict"},
            "wait": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    if bundle_module(module, "isthmus_agent") is None:
        words = ["no bundle yet, nothing to verify"]
        module.exit_json(changed=False, problems=[], unreached=None, warnings_of_agent=words, loss=None, proofs={})
    deadline = time.monotonic() + module.params["wait"]
    while True:
        verifier = Verifier(module)
        verifier.run()
        if not (verifier.problems or verifier.unreached) or time.monotonic() > deadline:
            break
        time.sleep(PAUSE)
    for words in verifier.remarks:
        module.warn(words)
    facts = {
        "problems": verifier.problems,
        "unreached": verifier.unreached,
        "warnings_of_agent": verifier.warnings,
        "loss": verifier.loss,
        "proofs": dict(verifier.proofs),
    }
    if verifier.problems:
        scope, waited = module.params["scope"], module.params["wait"]
        wrong = {
            "mesh": "the mesh is not what the inventory says",
            "host": "not everything works after the change",
            "step": "packets cannot go the new way",
        }[scope]
        module.fail_json(
            msg=f"On {verifier.spec['host']} {wrong}{f', for {waited} s' if waited else ''}: "
            + " ".join(f"({number}) {words}" for number, words in enumerate(verifier.problems, 1)),
            **facts,
        )
    module.exit_json(changed=False, **facts)


if __name__ == "__main__":
    main()
