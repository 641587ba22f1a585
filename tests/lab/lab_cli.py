# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's command line (`tests/lab/lab`)."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import rootfs
from isthmus_lab import Lab
from kubernetes_lab import EVERY_CLUSTER, Kubernetes, clusters_there
from kubernetes_machine import PROXY_MODES
from lab_system import LabError


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab", description="An estate of systemd machines on this one.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="say what this machine lacks; changes nothing")
    commands.add_parser("up", help="boot every machine")
    commands.add_parser("down", help="end and remove everything of the lab")
    status = commands.add_parser("status", help="machines and links")
    status.add_argument("-o", "--output", choices=("table", "json"), default="table")
    execute = commands.add_parser("exec", help="run a command as root on a machine, in the machine's own cgroup")
    execute.add_argument("host")
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD...")
    link = commands.add_parser("link", help="cut a site off from the other sites, restore it, set its MTU")
    link.add_argument("site")
    link.add_argument("action", choices=("cut", "restore", "mtu"))
    link.add_argument("value", nargs="?", type=int, help="bytes, for mtu")
    link.add_argument("--controller", action="store_true", help="cut: off from the controller as well")
    power = commands.add_parser("power", help="off pulls the plug; reboot is orderly, reset is not")
    power.add_argument("host")
    power.add_argument("action", choices=("off", "on", "reboot", "reset"))
    ssh = commands.add_parser("ssh", help="a shell, or a command, by SSH as Ansible would")
    ssh.add_argument("host")
    ssh.add_argument("argv", nargs=argparse.REMAINDER, metavar="[CMD...]")
    kube = commands.add_parser(
        "kube", help="add a Kubernetes cluster to the lab, or remove it; check names what this machine lacks"
    )
    kube.add_argument("action", choices=("check", "up", "down", "proxy"))
    kube.add_argument("cluster", nargs="?", help="default: the first for check and up, else every one that is up")
    kube.add_argument(
        "--mode",
        choices=PROXY_MODES,
        default=PROXY_MODES[0],
        help="of kube-proxy, for up and proxy (default: %(default)s)",
    )
    kubectl = commands.add_parser("kubectl", help="kubectl as a cluster's administrator")
    kubectl.add_argument("cluster")
    kubectl.add_argument("argv", nargs=argparse.REMAINDER, metavar="[ARG...]")
    supervise = commands.add_parser("supervise", help="(the lab itself) run one machine")
    supervise.add_argument("host")
    cloud = commands.add_parser("cloud", help="(the lab itself) play a cloud's part for a cluster")
    cloud.add_argument("cluster")
    return parser


def do_check(lab: Lab, _: argparse.Namespace) -> int:
    missing = lab.lacks()
    for word in missing:
        print(f"lacks {word}")
    return 1 if missing else 0


def do_up(lab: Lab, _: argparse.Namespace) -> int:
    lab.up()
    return 0


def do_down(lab: Lab, _: argparse.Namespace) -> int:
    lab.down()
    return 0


def do_status(lab: Lab, options: argparse.Namespace) -> int:
    machines, links = lab.status(), lab.links()
    if options.output == "json":
        print(json.dumps({"machines": machines, "links": links}, indent=2))
        return 0
    print(f"{'HOST':14}{'SITE':10}{'ADDRESS':16}{'STATE':10}{'PID':>8}{'MEMORY':>10}")
    for row in machines:
        memory = f"{row['memory_mib']} MiB"
        print(f"{row['host']:14}{row['site']:10}{row['address']:16}{row['state']:10}{row['pid'] or '-':>8}{memory:>10}")
    print(f"\n{'SITE':14}{'NETWORK':18}{'MTU':6}LINK")
    for row in links:
        print(f"{row['site']:14}{row['network']:18}{row['mtu']:<6}{row['link']}")
    return 0


def do_exec(lab: Lab, options: argparse.Namespace) -> int:
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        raise LabError("exec: no command; `tests/lab/lab exec HOST -- CMD...`")
    return lab.pass_through(options.host, argv)


def do_link(lab: Lab, options: argparse.Namespace) -> int:
    if options.action == "cut":
        lab.cut(options.site, options.controller)
    elif options.action == "restore":
        lab.restore(options.site)
    elif options.value is None:
        raise LabError("link SITE mtu: how many bytes?")
    else:
        lab.set_mtu(options.site, options.value)
    return 0


def do_power(lab: Lab, options: argparse.Namespace) -> int:
    if options.action == "off":
        lab.power_off(options.host)
    elif options.action == "on":
        lab.power_on(options.host)
    else:
        lab.reboot(options.host, hard=options.action == "reset")
    return 0


def do_ssh(lab: Lab, options: argparse.Namespace) -> int:
    command = [*lab.ssh(options.host), *options.argv]
    os.execvp(command[0], command)  # noqa: S606


def do_kube(lab: Lab, options: argparse.Namespace) -> int:
    if options.cluster:
        chosen = [Kubernetes(lab, options.cluster)]
    elif options.action in ("check", "up"):
        chosen = [Kubernetes(lab, name) for name in lab.kubernetes][:1]
    else:
        chosen = clusters_there(lab)
    if not chosen:
        raise LabError("no Kubernetes cluster is up; `tests/lab/lab kube up` brings one up")
    status = 0
    for cluster in chosen:
        if options.action == "check":
            missing = cluster.lacks()
            for word in missing:
                print(f"lacks {word}")
            status = status or bool(missing)
        elif options.action == "up":
            cluster.up(options.mode)
        elif options.action == "down":
            cluster.down()
        else:
            cluster.set_proxy_mode(options.mode)
    return status


def do_kubectl(lab: Lab, options: argparse.Namespace) -> int:
    command = Kubernetes(lab, options.cluster).command(*options.argv)
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606


def do_supervise(lab: Lab, options: argparse.Namespace) -> int:
    return lab.supervise(lab.host(options.host))


def do_cloud(lab: Lab, options: argparse.Namespace) -> int:
    Kubernetes(lab, options.cluster).balance()
    return 0


COMMANDS: dict[str, Callable[[Lab, argparse.Namespace], int]] = {
    "check": do_check,
    "up": do_up,
    "down": do_down,
    "status": do_status,
    "exec": do_exec,
    "link": do_link,
    "power": do_power,
    "ssh": do_ssh,
    "kube": do_kube,
    "kubectl": do_kubectl,
    "supervise": do_supervise,
    "cloud": do_cloud,
}


def inventory_of(command: str) -> Path | None:
    """Commands on machines know those of Kubernetes clusters too, as soon as there are some."""
    if os.environ.get("ISTHMUS_LAB_INVENTORY"):
        return None
    if command in ("kube", "kubectl") or (command != "up" and Lab().kubernetes_directory.exists()):
        return EVERY_CLUSTER
    return None


def main(words: Sequence[str]) -> int:
    options = arguments().parse_args(words)
    lab = Lab(inventory_of(options.command))
    status = COMMANDS[options.command](lab, options)
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (LabError, rootfs.RootfsError) as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # Who read our output (`| head`) has gone. Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
