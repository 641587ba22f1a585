#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Names everything that this machine lacks for the lab. Changes nothing, needs nothing but a shell and coreutils:
# what `make setup` installs is not asked for here, and is checked by `tests/lab/lab check` after it.
# usage: scripts/precheck.sh   exit 0: nothing is lacking
set -u
lacks=0
lack() { printf 'lacks: %s\n' "$*" >&2; lacks=1; }

[ "$(id -u)" = 0 ] || lack "root: namespaces, mounts and eBPF need it. Run it as root."
command -v apt-get > /dev/null || lack "apt: this needs Debian 12 or a relative (packages: requirements/apt.txt)."
case $(uname -m) in
    x86_64 | aarch64) ;;
    *) lack "architecture: $(uname -m); there are bundles for x86_64 and aarch64." ;;
esac
major=$(uname -r | cut -d. -f1)
minor=$(uname -r | cut -d. -f2 | sed 's/[^0-9].*//')
if [ "$major" -lt 5 ] || { [ "$major" -eq 5 ] && [ "$minor" -lt 15 ]; }; then
    lack "kernel: $(uname -r); the agent needs the eBPF features of 5.15."
fi
for kind in cgroup2 bpf; do
    grep -qw "$kind" /proc/filesystems || lack "kernel: no file system '$kind'."
done
awk '$3 == "cgroup2" && $2 ~ "^/sys/fs/cgroup" { found = 1 } END { exit !found }' /proc/self/mounts ||
    lack "cgroup2: not mounted below /sys/fs/cgroup."
[ -e /proc/self/ns/net ] || lack "kernel: no network namespaces."
if command -v unshare > /dev/null && [ "$(id -u)" = 0 ]; then
    unshare --net --mount --pid --fork true 2> /dev/null || lack "namespaces: unshare(2) is not permitted (a container? it must be privileged)."
fi

free_mib() {
    where=$1
    while [ ! -e "$where" ]; do where=$(dirname "$where"); done
    df --output=avail --block-size=1M "$where" | tail -n 1 | tr -d ' '
}
need_disk() {
    have=$(free_mib "$1")
    [ "$have" -ge "$2" ] || lack "disk: $1 needs $2 MiB, $have MiB are free."
}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/isthmus
# Only what is not there yet has to fit.
[ -e "$cache/rootfs.log" ] || need_disk "$cache" 1500
[ -e "${ISTHMUS_LAB_STATE:-/var/lib/isthmus-lab}/rootfs" ] || need_disk "${ISTHMUS_LAB_STATE:-/var/lib/isthmus-lab}" 1500
command -v clang-14 > /dev/null || need_disk /usr 1000
memory=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)
[ "$memory" -ge 2000 ] || lack "memory: 2000 MiB are needed, $memory MiB are available."

exit $lacks
