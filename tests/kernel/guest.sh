#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Runs tests in the guest, whose PID 1 it is, and turns the guest off.
# usage: guest.sh CHECKOUT BIN MODULES TEST...   (BIN: of the Python environment; MODULES: those of the guest's kernel)
export PATH="$2:/usr/sbin:/usr/bin:/sbin:/bin" HOME=/root TMPDIR=/scratch ISTHMUS_STOCK_KERNEL=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
# Else made by udev: `wg` reads its settings there.
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
mount -t tmpfs tmpfs /run
# Not below /run, which machines in tests have of their own.
mkdir /scratch
mount -t tmpfs tmpfs /scratch
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p "/lib/modules/$(uname -r)"
mount --bind "$3" "/lib/modules/$(uname -r)"
cd "$1" || exit
shift 3
python -m pytest --color=no -p no:cacheprovider -o console_output_style=count "$@"
echo "guest: pytest ended with status $?"
# Only a change of the terminal's settings waits for what is still on its way.
stty sane
/bin/busybox poweroff -f
