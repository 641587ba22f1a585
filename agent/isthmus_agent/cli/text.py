# SPDX-License-Identifier: GPL-3.0-or-later
"""Documents of the status API as text for a person. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus_mesh.encryption import CHANGING


def age(seconds: float | None) -> str:
    """A duration in the largest two units that matter; `never` for None."""
    if seconds is None:
        return "never"
    if seconds < 60:
        return f"{seconds:.0f}s"
    whole = int(seconds)
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // small}{small_name}"
    return f"{whole}s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _ready(value: bool | None) -> str:
    return {True: "ready", False: "not ready", None: "unknown"}[value]


def status(document: dict[str, Any]) -> str:
    """`isthmus status`."""
    datapath, etcd, last = document["datapath"], document["etcd"], document["last_known_good"]
    source = f" from {datapath['source']}" if datapath["source"] else ""
    lines = [
        f"{document['cluster']}/{document['host']}  isthmusd {document['version']}  up {age(document['uptime'])}",
        f"datapath   {datapath['state']}{source}, last applied {age(datapath['age'])} ago"
        if datapath["age"] is not None
        else f"datapath   {datapath['state']}",
        f"own etcd   {'answers' if etcd['connected'] else 'does not answer'}, last proof {_ago(etcd['age'])}"
        f"{'' if etcd['complete'] else ', its state is not complete'}",
        f"last good  written {_ago(last['age'])}"
        + (f", started from that of {last['loaded']}" if last["loaded"] else ""),
    ]
    if kubernetes := document["kubernetes"]:
        ranges = ", ".join(kubernetes["ranges"]) or "no range"
        alone = f", {kubernetes['untranslated']} without socket translation" if kubernetes["untranslated"] else ""
        lines.append(f"pods       {kubernetes['pods']} of node {kubernetes['node']}, in {ranges}{alone}")
    if (wireguard := document["wireguard"]) is not None:
        lines.append(f"wireguard  {_tunnel(wireguard)}")
        if wireguard["second"] is not None:
            lines.append(f"           {_tunnel(wireguard['second'])}, taken too while keys are replaced")
    if (gateways := document.get("gateways")) is not None and (words := _gateways(gateways)):
        lines.append(f"gateways   {words}")
    if datapath["drops"]:
        drops = ", ".join(f"{name} {count}" for name, count in sorted(datapath["drops"].items()))
        lines.append(f"drops      {drops}")
    if document["workloads"]:
        rows = []
        for workload in document["workloads"]:
            offers = ", ".join(
                f"{name} {_ready(backend['ready'])}" + (f" ({backend['reason']})" if backend["reason"] else "")
                for name, backend in workload["services"].items()
            )
            rows.append(
                [
                    f"{workload['namespace']}/{workload['name']}",
                    workload["address"],
                    str(workload["identity"] or "none"),
                    "runs" if workload["running"] else "does not run",
                    offers or "-",
                ]
            )
        lines += ["", table(["WORKLOAD", "ADDRESS", "IDENTITY", "CGROUP", "SERVICES"], rows)]
    if document["nodes"]:
        native = any(node["routing"]["stage"] != "plain" for node in document["nodes"])
        rows = [
            [
                f"{node['cluster']}/{node['name']}",
                node["address"] or "-",
                node["endpoint"] or "-",
                f"{node['probe']}{' one way' if node['deaf'] else ''}",
                age(node["answer_age"]) if node["answer_age"] is not None else "-",
                f"{node['rtt_ms']}ms" if node["rtt_ms"] is not None else "-",
                *([_routing(node)] if native else []),
                *([] if wireguard is None else [_encryption(node)]),
            ]
            for node in document["nodes"]
        ]
        head = ["NODE", "MESH ADDRESS", "ENDPOINT", "PROBE", "LAST ANSWER", "RTT", *(["WAY"] if native else [])]
        lines += ["", table(head if wireguard is None else [*head, "ENCRYPTION"], rows)]
    if document["first_contact"]:
        rows = [
            [
                f"{peer['cluster']}/{peer['name']}",
                peer["site"],
                f"this host, to {peer['endpoint']}" if peer["opens"] else "the other host",
                "yes" if peer["told"] else "not yet",
                _encryption({**peer, "probe": ""}),
            ]
            for peer in document["first_contact"]
        ]
        lines += ["", table(["FIRST CONTACT", "SITE", "OPENED BY", "KNOWN TO ETCD", "ENCRYPTION"], rows)]
    if document["warnings"]:
        lines += ["", *(f"! {words}" for words in document["warnings"])]
    return "\n".join(lines)


def _routing(node: dict[str, Any]) -> str:
    if node["probe"] == "this host":
        return "-"
    found = node["routing"]
    return f"{found['way']} ({found['stage']})" if found["stage"] in CHANGING else str(found["way"])


def _gateways(found: dict[str, Any]) -> str:
    """Those of the site, and on one of them to which sites its tunnels lead."""
    told = [f"{one['host']} {one['state']}" for one in found["gateways"]]
    passing = {True: "open", False: "closed", None: "not known yet"}
    told += [f"tunnels to {site} {passing[open_]}" for site, open_ in (found["tunnels"] or {}).items()]
    if dropped := found["dropped"]:
        told.append(f"{dropped} packet{'' if dropped == 1 else 's'} dropped that went beside them")
    return ", ".join(told)


def _tunnel(tunnel: dict[str, Any]) -> str:
    peers = f"{tunnel['peers']} peer{'' if tunnel['peers'] == 1 else 's'}"
    return (
        f"{tunnel['implementation'] or 'not there'}, UDP {tunnel['port']}, public key {tunnel['public_key'] or 'none'} "
        f"made {_ago(tunnel['key_age'])}, {peers}"
    )


def _encryption(node: dict[str, Any]) -> str:
    if node["probe"] == "this host":
        return "-"
    found = node["encryption"]
    changing = f" ({found['stage']})" if found["stage"] in CHANGING else ""
    if found["reason"]:
        return f"{found['state']}{changing}: {found['reason']}"
    if found["stage"] == "plain":
        return "plain"
    return f"{found['state']}{changing}, handshake {_ago(found['handshake_age'])}"


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{age(seconds)} ago"


def services(document: dict[str, Any]) -> str:
    """`isthmus services`."""
    rows = []
    for service in document["services"]:
        ports = ",".join(f"{port['port']}/{port['protocol']}" for port in service["ports"]) or "-"
        scope = "global" if service["global"] else "local"
        if service["affinity"] != "none":
            scope += f", {service['affinity']}"
        if service["session_affinity"]:
            scope += f", clients stay {age(service['session_affinity'])}"
        name = f"{service['namespace']}/{service['name']}"
        first = [name, service["address"] or ("headless" if service["headless"] else "none yet"), ports, scope]
        backends = [
            [
                f"{backend['cluster']}/{backend['node'] or '?'}",
                f"{backend['address']}:{backend['port']}",
                ("in use" if backend["used"] else "held") if backend["reachable"] else "unreachable",
                str(backend["connects"] + backend["datagrams"]),
            ]
            for backend in service["backends"]
        ] or [["-", "-", "no backend", "-"]]
        for number, backend in enumerate(backends):
            rows.append([*(first if number == 0 else [""] * 4), *backend])
    return table(["SERVICE", "ADDRESS", "PORTS", "SCOPE", "NODE", "BACKEND", "STATE", "FLOWS"], rows)


def peers(document: dict[str, Any]) -> str:
    """`isthmus peers`."""
    rows = [
        [
            peer["name"],
            str(peer["id"] or "?"),
            peer["state"],
            _ago(peer["age"]),
            f"{peer['nodes_up']}/{peer['nodes_probed']} up, {peer['nodes']} known",
            str(peer["keys"].get("services", 0)),
            str(sum(peer["refused"].values())),
            peer["endpoint"] or "-",
        ]
        for peer in document["peers"]
    ]
    text = table(["PEER", "ID", "STATE", "LAST PROOF", "NODES PROBED", "SERVICES", "REFUSED", "ENDPOINT"], rows)
    own = document["own_etcd"]
    if not own["connected"]:
        text += f"\n! own etcd does not answer (last proof {_ago(own['age'])}): what the mirror last said may be old"
    for peer in document["peers"]:
        if peer["refused_last"]:
            text += f"\n! {peer['name']}: {peer['refused_last'][0]} was refused: {peer['refused_last'][1]}"
    api = document["kubernetes"]
    if api is not None:
        objects = ", ".join(f"{number} {kind}" for kind, number in api["objects"].items())
        text += f"\n\nKubernetes API {api['server']}: {api['state']} since {api['since']}; {objects}"
        text += "".join(f"\n! {words}" for words in [*filter(None, [api["error"]]), *api["problems"]])
    return text


def generations(document: dict[str, Any]) -> str:
    """`isthmus generations`."""
    if not document["generations"]:
        return "no generation: nothing that this host depends on was changed here yet"
    rows = [
        [
            f"{one['number']}{' *' if one['current'] else ''}",
            one["time"],
            one["state"],
            one["spec"][:8] or "-",
            (", ".join(path.rsplit("/", 1)[-1] for path in one["differs"]) or "nothing")
            if one["complete"]
            else "it was never completed",
            one["note"],
        ]
        for one in document["generations"]
    ]
    return table(["NUMBER", "MADE", "STATE", "SPEC", "DIFFERS FROM NOW", "NOTE"], rows) + "\n* this host now"
