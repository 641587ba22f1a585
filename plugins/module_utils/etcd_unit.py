# SPDX-License-Identifier: BSD-2-Clause
"""etcd on a host as text: its environment file and its units. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICE = "isthmus-etcd.service"
DEFRAG_SERVICE = "isthmus-etcd-defrag.service"
DEFRAG_TIMER = "isthmus-etcd-defrag.timer"
UNITS = (SERVICE, DEFRAG_SERVICE, DEFRAG_TIMER)
USER = "isthmus-etcd"
DATA = "/var/lib/isthmus/etcd"
SNAPSHOTS = "/var/lib/isthmus/snapshots"
ENVIRONMENT = "/etc/isthmus/etcd.env"
PKI = "/etc/isthmus/pki"
REVOKED = "revoked.crl"  # in PKI: the certificates that etcd refuses
DISTRIBUTION = "etcd.service"
MASKED = "/var/lib/isthmus/etcd-unit-before"  # says that we masked the distribution's unit, and how it was before
FIRST_START = f"/run/systemd/system/{SERVICE}.d/first-start.conf"

_SANDBOX = """\
CapabilityBoundingSet=
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectHostname=yes
ProtectClock=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077
"""

_HEADER = "# Written by isthmus.mesh; changes made here by hand are replaced by the next run of the playbook.\n"


TUNING: Mapping[str, str] = {
    "ETCD_AUTO_COMPACTION_MODE": "periodic",
    "ETCD_AUTO_COMPACTION_RETENTION": "1h",
    # Twice etcd's defaults: machines that do other work too must not lose their leader at every peak.
    "ETCD_HEARTBEAT_INTERVAL": "200",
    "ETCD_ELECTION_TIMEOUT": "2000",
    "ETCD_SNAPSHOT_COUNT": "10000",
    "ETCD_LOGGER": "zap",
    "ETCD_LOG_OUTPUTS": "stderr",
}
"""Settings that are the same for every member of every cluster."""


def security(cluster: str, peer_cn: str, revocation: bool = True) -> dict[str, str]:
    """Who a member lets in, and as whom; the files are in `PKI`."""
    trusted, revoked = f"{PKI}/trust/{cluster}.crt", f"{PKI}/{REVOKED}"
    return {
        "ETCD_CERT_FILE": f"{PKI}/etcd-server.crt",
        "ETCD_KEY_FILE": f"{PKI}/etcd-server.key",
        # Only this cluster's own authority: etcd knows users by certificate name, so whoever signs here can be root.
        "ETCD_TRUSTED_CA_FILE": trusted,
        "ETCD_CLIENT_CERT_AUTH": "true",
        "ETCD_PEER_CERT_FILE": f"{PKI}/etcd-peer.crt",
        "ETCD_PEER_KEY_FILE": f"{PKI}/etcd-peer.key",
        "ETCD_PEER_TRUSTED_CA_FILE": trusted,
        "ETCD_PEER_CLIENT_CERT_AUTH": "true",
        "ETCD_PEER_CERT_ALLOWED_CN": peer_cn,
        **({"ETCD_CLIENT_CRL_FILE": revoked, "ETCD_PEER_CRL_FILE": revoked} if revocation else {}),
    }


def environment(spec: Mapping[str, Any], revocation: bool = True) -> str:
    """`/etc/isthmus/etcd.env` from a node spec. What only a first start needs is not in it (see `first_start`).

    `revocation`: whether there is a list of revoked certificates. With the setting and without the file etcd would
    refuse everybody.
    """
    member = spec["member"]
    cluster = spec["cluster"]["name"]
    peer_cn = next(entry["cn"] for entry in spec["pki"]["certificates"] if entry["name"] == "etcd-peer")
    values = {
        "ETCD_NAME": member["name"],
        "ETCD_DATA_DIR": DATA,
        "ETCD_LISTEN_CLIENT_URLS": f"https://0.0.0.0:{urlsplit(member['client_url']).port}",
        "ETCD_LISTEN_PEER_URLS": f"https://0.0.0.0:{urlsplit(member['peer_url']).port}",
        "ETCD_ADVERTISE_CLIENT_URLS": member["client_url"],
        "ETCD_INITIAL_ADVERTISE_PEER_URLS": member["peer_url"],
        **security(cluster, peer_cn, revocation),
        "ETCD_ENABLE_GRPC_GATEWAY": "false",
        "ETCD_QUOTA_BACKEND_BYTES": str(member["quota_bytes"]),
        **TUNING,
    }
    return _HEADER + "".join(f"{name}={value}\n" for name, value in values.items())


def settings(environment: str) -> dict[str, str]:
    """The settings in the text of an environment file."""
    return dict(line.split("=", 1) for line in environment.splitlines() if line.startswith("ETCD_") and "=" in line)


def cluster_of(settings: Mapping[str, str]) -> str:
    """The cluster that a member with these settings belongs to, by the authority that it trusts; empty without any."""
    directory, _slash, name = settings.get("ETCD_TRUSTED_CA_FILE", "").rpartition("/")
    return name[: -len(".crt")] if directory == f"{PKI}/trust" and name.endswith(".crt") else ""


def local_url(settings: Mapping[str, str]) -> str:
    """The member's client endpoint as seen from its own host."""
    return f"https://127.0.0.1:{urlsplit(settings['ETCD_ADVERTISE_CLIENT_URLS']).port}"


def service(binary: str, config: str) -> str:
    """`isthmus-etcd.service`; `config` is the digest that tells a running process of an older configuration.

    A member never starts without data except through `first_start`: an empty member that comes up under an old name
    would break raft's promises.
    """
    return (
        _HEADER
        + f"""\
[Unit]
Description=etcd of the Isthmus mesh
Documentation=https://etcd.io/docs
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0
ConditionPathExists={DATA}/member

[Service]
Type=notify
User={USER}
Group={USER}
ExecStart={binary}
EnvironmentFile={ENVIRONMENT}
Environment=ISTHMUS_CONFIG={config}
Restart=always
RestartSec=2
TimeoutStartSec=120
TimeoutStopSec=30
StateDirectory=isthmus/etcd
StateDirectoryMode=0700
LimitNOFILE=65536
LimitCORE=0
TasksMax=4096
OOMScoreAdjust=-900
IOSchedulingClass=best-effort
IOSchedulingPriority=0
MemoryDenyWriteExecute=yes
{_SANDBOX}
[Install]
WantedBy=multi-user.target
"""
    )


def first_start(peers: Mapping[str, str], state: str, token: str) -> str:
    """The drop-in that lets a member start without data, once: `state` is `new` or `existing`."""
    cluster = ",".join(f"{name}={url}" for name, url in sorted(peers.items()))
    return f"""\
[Unit]
ConditionPathExists=

[Service]
Environment=ETCD_INITIAL_CLUSTER={cluster}
Environment=ETCD_INITIAL_CLUSTER_STATE={state}
Environment=ETCD_INITIAL_CLUSTER_TOKEN={token}
"""


def defrag_service() -> str:
    """`isthmus-etcd-defrag.service`: takes this member's turn, so that members never stand still together.

    Root, whose etcd's root certificate is, with no capability: it speaks to etcd servers and writes nothing.
    """
    return (
        _HEADER
        + f"""\
[Unit]
Description=Defragment the etcd of the Isthmus mesh on this host
After=isthmus-etcd.service

[Service]
Type=oneshot
ExecStart=/opt/isthmus/current/bin/python -m isthmus_agent.etcd_admin defragment
Nice=10
LimitCORE=0
ProtectProc=invisible
{_SANDBOX}"""
    )


def defrag_timer() -> str:
    """`isthmus-etcd-defrag.timer`: weekly, at another time on every member."""
    return (
        _HEADER
        + """\
[Unit]
Description=Defragment the etcd of the Isthmus mesh once a week

[Timer]
OnCalendar=weekly
RandomizedDelaySec=3d
FixedRandomDelay=yes

[Install]
WantedBy=timers.target
"""
    )
