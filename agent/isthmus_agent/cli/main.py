# SPDX-License-Identifier: GPL-3.0-or-later
"""`isthmus`: what a person asks a host.

Exit status: 0 all is well, 1 something differs or is refused, 2 the agent does not answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isthmus_mesh.generations import SECONDS

from isthmus_agent import generations
from isthmus_agent.cli import text
from isthmus_agent.cli.client import AgentAbsent, AgentSilent, ask

SOCKET = Path("/run/isthmus/agent.sock")

OK, DIFFERENT, SILENT = 0, 1, 2


def _print(document: dict[str, Any], output: str, render: Callable[[dict[str, Any]], str]) -> None:
    print(json.dumps(document, indent=2) if output == "json" else _printable(render(document)))


def _printable(shown: str) -> str:
    """Names and reasons come from peers too: no control sequence of theirs reaches the terminal."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "\N{REPLACEMENT CHARACTER}" for mark in shown)


def _pinned() -> dict[str, Any]:
    """What the kernel holds without an agent, from the pinned maps."""
    from isthmus_agent.agent.kernel import bundled_libbpf
    from isthmus_agent.bpf.driver import BpfDatapath
    from isthmus_agent.bpf.errors import BpfError

    datapath = BpfDatapath(libbpf=bundled_libbpf())
    try:
        datapath.open_pinned()
        counters, capacity = datapath.counters(), datapath.capacity()
    except (BpfError, OSError) as error:
        return {"error": str(error)}
    finally:
        datapath.close()
    return {
        "maps": {name: {"used": entry.used, "maximum": entry.maximum} for name, entry in capacity.items()},
        "backends": [
            {"address": str(address), "port": port, "protocol": protocol, "connects": count.connects}
            for (address, port, protocol), count in counters.backends.items()
        ],
        "drops": {name: count for name, count in counters.drops.items() if count},
    }


def _silent(error: AgentSilent, output: str) -> int:
    kernel = _pinned()
    if output == "json":
        print(json.dumps({"error": str(error), "kernel": kernel}, indent=2))
        return SILENT
    print(f"isthmus: {error}", file=sys.stderr)
    if "error" in kernel:
        print(f"the kernel: {kernel['error']}", file=sys.stderr)
        return SILENT
    print("what the kernel holds and goes on doing without the agent:")
    rows = [[name, str(entry["used"]), str(entry["maximum"])] for name, entry in sorted(kernel["maps"].items())]
    print(text.table(["MAP", "ENTRIES", "MAXIMUM"], rows))
    return SILENT


def _show(options: argparse.Namespace) -> int:
    route, render = {
        "status": ("/v1/status", text.status),
        "services": ("/v1/services", text.services),
        "peers": ("/v1/peers", text.peers),
    }[options.command]
    try:
        document = ask(options.socket, route)
    except AgentSilent as error:
        return _silent(error, options.output)
    _print(document, options.output, render)
    return OK


def _audit(options: argparse.Namespace) -> int:
    try:
        if options.repair:
            found = ask(options.socket, "/v1/repair", "POST")["repaired"]
        else:
            found = ask(options.socket, "/v1/audit")["problems"]
    except AgentSilent as error:
        if options.output == "json":
            print(json.dumps({"error": str(error)}))
        else:
            print(f"isthmus: {error}", file=sys.stderr)
        return SILENT
    word = "repaired" if options.repair else "problems"
    if options.output == "json":
        print(json.dumps({word: found}, indent=2))
    else:
        print("\n".join(found) or "the kernel holds what is wanted")
    return DIFFERENT if found and not options.repair else OK


def _remove(options: argparse.Namespace) -> int:
    """Take everything of ours out of the kernel. Traffic over the mesh stops."""
    if not options.yes:
        print("isthmus: this ends all mesh traffic of this host; stop isthmusd first, then say --yes", file=sys.stderr)
        return DIFFERENT
    try:
        ask(options.socket, "/v1/peers")
        running = True
    except AgentAbsent:
        running = False
    except AgentSilent:
        running = True  # it is there and slow or in trouble
    if running:
        print("isthmus: isthmusd still runs and would restore it; first: systemctl stop isthmusd", file=sys.stderr)
        return DIFFERENT
    removed = _remove_datapath()
    if options.output == "json":
        print(json.dumps({"removed": removed}, indent=2))
    else:
        print("\n".join(f"removed {words}" for words in removed) or "nothing of ours is in the kernel")
    return OK


def _remove_datapath() -> list[str]:
    from isthmus_agent import netlink
    from isthmus_agent.agent.kernel import bundled_libbpf
    from isthmus_agent.bpf.driver import BpfDatapath

    # The network first: while it goes, the hooks must not choose backends that cannot be reached.
    removed = netlink.remove_network()
    for name in netlink.wireguard.DEVICES:
        removed += netlink.wireguard.remove_device(name)
    bpf = BpfDatapath(libbpf=bundled_libbpf())
    removed += [f"programs on interface {index}" for index in bpf.detach_underlay(netlink.other_devices())]
    return [*removed, *bpf.remove_all()]


def _generations(options: argparse.Namespace) -> int:
    current = generations.current(generations.PLACE)
    found = [
        {
            "number": one.number,
            "current": one.number == current,
            "time": one.time,
            "state": one.state,
            "note": one.note,
            "spec": one.spec,
            "complete": one.files is not None,
            "differs": generations.differing(one),
        }
        for one in generations.known(generations.PLACE).values()
    ]
    _print({"generations": found}, options.output, text.generations)
    return OK


def _rollback(options: argparse.Namespace) -> int:
    """To an earlier generation. Run by the timer too, with --unless-confirmed."""
    unless = options.unless_confirmed
    why = (
        f"generation {options.number} was restored by hand"
        if unless is None
        else f"no new connection of the controller confirmed it within {SECONDS} s; generation {options.number} was "
        "restored"
    )
    try:
        restored = generations.roll_back(generations.PLACE, options.number, why, _remove_datapath, unless)
    except generations.GenerationError as error:
        print(f"isthmus: {error}. Nothing was changed.", file=sys.stderr)
        return DIFFERENT
    if restored is None:
        print(f"generation {unless} waits for no confirmation any more; nothing to do")
        return OK
    if options.output == "json":
        print(json.dumps({"number": options.number, "done": restored.done, "problems": restored.problems}, indent=2))
    else:
        print("\n".join(restored.done) or "everything was as in that generation already")
        if restored.whole:
            outcome = f"generation {options.number}; the next run of the playbook makes it what is planned again"
        else:
            again = "run this again when that is put right" if unless is None else f"it is tried again in {SECONDS} s"
            outcome = f"not generation {options.number} yet; {again}"
        print(f"this host is {outcome}")
        for problem in restored.problems:
            print(f"isthmus: {problem}", file=sys.stderr)
    return DIFFERENT if restored.problems else OK


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="isthmus", description="The mesh as this host sees it.")
    found.add_argument("--socket", type=Path, default=SOCKET, help="the agent's status socket")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-o", "--output", choices=("text", "json"), default="text")
    commands = found.add_subparsers(dest="command", required=True)
    commands.add_parser("status", parents=[common], help="this host: datapath, etcd, workloads, nodes, warnings")
    commands.add_parser("services", parents=[common], help="services, their addresses and backends")
    commands.add_parser("peers", parents=[common], help="the other clusters, with the age of the last proof")
    audit = commands.add_parser("audit", parents=[common], help="compare the kernel with what is wanted")
    audit.add_argument("--repair", action="store_true", help="make the kernel what is wanted")
    commands.add_parser("generations", parents=[common], help="what this host was, and what differs from it now")
    rollback = commands.add_parser("rollback", parents=[common], help="make this host an earlier generation again")
    rollback.add_argument("number", type=int, metavar="N", help="of `isthmus generations`")
    rollback.add_argument("--unless-confirmed", type=int, metavar="M", help="only while M waits to be confirmed")
    datapath = commands.add_parser("datapath", help="the kernel's part")
    actions = datapath.add_subparsers(dest="action", required=True)
    remove = actions.add_parser("remove", parents=[common], help="take everything of ours out of the kernel")
    remove.add_argument("--yes", action="store_true", help="do it")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "audit":
        return _audit(options)
    if options.command == "datapath":
        return _remove(options)
    if options.command == "generations":
        return _generations(options)
    if options.command == "rollback":
        return _rollback(options)
    return _show(options)


if __name__ == "__main__":
    sys.exit(main())
