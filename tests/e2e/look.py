# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on a lab machine and prints what there is, as JSON; standard library only. See `snapshot.py`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess

TREES = ("/etc", "/opt", "/usr/local", "/var/lib", "/root", "/run/isthmus", "/usr/lib/systemd/system")
# Written by systemd, sshd and Ansible on their own, by the user tools as a copy of what was before (with a dash), by a
# running etcd, agent and registrar, and by Kubernetes' own daemons.
MOVING_FILES = re.compile(
    r"^(/var/lib/systemd/(timers|random-seed|timesync|linger|catalog|coredump)|/var/lib/dpkg/lock|/var/lib/private$"
    r"|/etc/(passwd|shadow|group|gshadow|subuid|subgid)-$|/etc/\.pwd\.lock$|/root/\.ansible|/var/lib/logrotate"
    r"|/var/lib/isthmus/etcd/member/|/var/lib/isthmus/agent/last-known-good|/var/lib/isthmus/registrar/published"
    r"|/var/lib/(kubelet|containerd|kubernetes-etcd)/)"
)
# Units of sessions and of commands that look; `network-online.target` and `network-pre.target` are passive: once
# something has waited for the network, or was to be there before it, they stay until the machine boots again.
PASSING_UNITS = re.compile(
    r"(lab-exec-|session-|user-0|user@0|user-runtime-dir@|run-user-|init\.scope|systemd-tmpfiles-clean|run-r[0-9a-f]"
    r"|run-u[0-9]|logrotate|apt-daily|dpkg-db-backup|e2scrub|fstrim|dev-|sys-|proc-|network-(online|pre)\.target)"
)
MOVING_SYSCTLS = re.compile(r"tcp_fastopen_key|inet_peer|/random/|stable_secret|netfilter|nf_conntrack")
MOVING_ATTRIBUTES = {"ifindex", "valid_life_time", "preferred_life_time", "link_index", "expires", "used"}


def out(*words, good=(0,)):
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode not in good:
        raise SystemExit(f"{words} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def lines(*words, good=(0,)):
    return sorted(line.rstrip() for line in out(*words, good=good).splitlines() if line.strip())


def mounts():
    with open("/proc/self/mounts") as file:
        return [line.split()[1:3] for line in file]


def files():
    found = {}
    for top in TREES:
        for where, directories, names in os.walk(top):
            for path in (where, *(os.path.join(where, name) for name in (*directories, *names))):
                if MOVING_FILES.match(path):
                    continue
                try:
                    about = os.lstat(path)
                    text = f"{stat.filemode(about.st_mode)} {about.st_uid}:{about.st_gid}"
                    if stat.S_ISLNK(about.st_mode):
                        text += " -> " + os.readlink(path)
                    elif stat.S_ISREG(about.st_mode):
                        with open(path, "rb") as file:
                            text += " " + hashlib.sha256(file.read()).hexdigest()
                except FileNotFoundError:
                    continue
                found[path] = text
    return found


def units():
    found = {}
    for line in lines("systemctl", "list-unit-files", "--no-legend", "--plain"):
        name, state = line.split()[:2]
        if not PASSING_UNITS.match(name):
            found[name] = state
    for line in lines("systemctl", "list-units", "--all", "--no-legend", "--plain"):
        name, load, active, sub = line.split()[:4]
        if load == "loaded" and not PASSING_UNITS.match(name):
            found[name + " is"] = f"{active} {sub}"
    return found


def cgroups():
    top = next(where for where, kind in mounts() if kind == "cgroup2")
    found = []
    for where, directories, _ in os.walk(top):
        depth = os.path.relpath(where, top).count("/")
        directories[:] = [name for name in directories if not PASSING_UNITS.match(name) and depth < 2]
        found += [os.path.relpath(os.path.join(where, name), top) for name in directories]
    return sorted(found)


def clean(value):
    if isinstance(value, dict):
        return {key: clean(entry) for key, entry in sorted(value.items()) if key not in MOVING_ATTRIBUTES}
    return [clean(entry) for entry in value] if isinstance(value, list) else value


def network(*words):
    return sorted(json.dumps(clean(entry)) for entry in json.loads(out("ip", "-j", *words) or "[]"))


def sysctls():
    return [line for line in lines("sysctl", "-a") if line.startswith("net.") and not MOVING_SYSCTLS.search(line)]


def resolver():
    if subprocess.run(["systemctl", "is-active", "--quiet", "systemd-resolved"]).returncode != 0:
        return []
    return [out("resolvectl", "dns"), out("resolvectl", "domain")]


print(
    json.dumps(
        {
            "files": files(),
            "units": units(),
            "users": lines("getent", "passwd") + lines("getent", "group") + lines("getent", "shadow"),
            "packages": lines("dpkg-query", "-W"),
            "addresses": network("address"),
            "routes": network("-4", "route", "show", "table", "all") + network("-6", "route", "show", "table", "all"),
            "rules": network("-4", "rule") + network("-6", "rule"),
            "nft": out("nft", "--stateless", "list", "ruleset").splitlines(),
            "pins": lines("find", "/sys/fs/bpf", "-mindepth", "1"),
            "mounts": sorted(" ".join(mount) for mount in mounts() if not mount[0].startswith("/run/")),
            "sockets": sorted({" ".join(line.split()[:2] + line.split()[4:5]) for line in lines("ss", "-Hltun")}),
            "cgroups": cgroups(),
            "sysctls": sysctls(),
            "resolver": resolver(),
            "names": [
                lines("getent", "ahostsv4", n, good=(0, 2))
                for n in ("onprem-1.lab.test", "web.shop.svc.clusterset.local")
            ],
        }
    )
)
