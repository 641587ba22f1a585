#!/bin/busybox sh
# SPDX-License-Identifier: GPL-3.0-or-later
# PID 1 of a machine of the lab in the guest, in its initramfs: the shared directory becomes the root, systemd PID 1.
# shellcheck shell=dash
set -eu
for module in /modules/*.ko; do /bin/busybox insmod "$module"; done
/bin/busybox mkdir -p /new
/bin/busybox mount -t virtiofs host /new
# shellcheck source=/dev/null
. /settings
/bin/busybox ip link set lo up
/bin/busybox ip address add "$ADDRESS" dev eth0
/bin/busybox ip link set eth0 up
/bin/busybox ip route add default via "$GATEWAY"
exec /bin/busybox switch_root /new /lib/systemd/systemd
