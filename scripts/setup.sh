#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Installs what the controller needs: Debian packages (requirements/apt.txt) and a Python environment with
# exact versions (requirements/controller.txt) outside of the clone. Does only what is missing.
# usage: [ISTHMUS_FULL=1] scripts/setup.sh VENV
# ISTHMUS_FULL: also what only `make test-full` needs (requirements/apt-full.txt).
set -eu

venv=$1
here=$(dirname "$(readlink -f "$0")")
root=$(dirname "$here")

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

packages=$(sed 's/#.*//' "$root/requirements/apt.txt" ${ISTHMUS_FULL:+"$root/requirements/apt-full.txt"} | xargs)

missing_packages() {
    # One query for all: what is not "install ok installed" is printed.
    for package in $packages; do
        case $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true) in
            installed) ;;
            *) printf '%s ' "$package" ;;
        esac
    done
}

install_packages() {
    [ "$(id -u)" = 0 ] || die "these Debian packages are missing: $1; run this as root"
    command -v apt-get >/dev/null || die "this is no Debian (no apt-get); install by hand: $1"
    say "installing Debian packages (1 to 5 minutes, at most 1 GB): $1"
    # Nothing that is installed here may start a service on this machine (etcd-server would).
    policy=/usr/sbin/policy-rc.d
    saved=
    if [ -e $policy ]; then saved=$(mktemp); cp -p $policy "$saved"; fi
    restore() { if [ -n "$saved" ]; then mv "$saved" $policy; else rm -f $policy; fi; }
    trap restore EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod 755 $policy
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    # shellcheck disable=SC2086 # a list of words
    if ! { apt-get -o Acquire::Retries=3 update && apt-get -o Acquire::Retries=3 install --yes --no-install-recommends $1; } > "$log" 2>&1; then
        tail -n 15 "$log" >&2
        die "apt-get failed; the whole log is $log"
    fi
    rm -f "$log"
    restore
    trap - EXIT INT TERM
    # Nor at the next boot.
    for each in etcd-server:etcd.service charon-systemd:strongswan.service; do
        case " $1 " in
            *" ${each%:*} "*)
                if command -v systemctl > /dev/null; then systemctl disable --quiet "${each#*:}"; fi ;;
        esac
    done
}

missing=$(missing_packages)
if [ -n "$missing" ]; then install_packages "$missing"; fi

make_venv() {
    say "Python environment: making $venv (about 1 minute, 400 MB)"
    rm -rf "$venv"
    mkdir -p "$(dirname "$venv")"
    # Debian's own interpreter: a pyenv shim in PATH may point at a Python that is not there.
    /usr/bin/python3 -m venv "$venv"
    version=$(sed -n 's/^pip==//p' "$root/requirements/controller.txt")
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "pip==$version"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary=:all: --no-deps \
        --requirement "$root/requirements/controller.txt"
    "$venv/bin/python" -m pip check --quiet
    touch "$venv/complete"
    say "Python environment: ready"
}

if [ ! -e "$venv/complete" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    mkdir -p "$(dirname "$venv")"
    exec 9> "$venv.lock"
    flock 9
    [ -e "$venv/complete" ] || make_venv
fi
