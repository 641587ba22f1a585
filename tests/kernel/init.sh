#!/bin/busybox sh
# SPDX-License-Identifier: GPL-3.0-or-later
# PID 1 of the guest, in its initramfs: the controller's root file system below a layer in memory becomes the root.
# What the tests write stays in the guest.
# shellcheck shell=dash
set -eu
for module in /modules/*.ko; do /bin/busybox insmod "$module"; done
/bin/busybox mkdir -p /host /layer /new
/bin/busybox mount -t virtiofs -o ro host /host
/bin/busybox mount -t tmpfs layer /layer
/bin/busybox mkdir /layer/upper /layer/work
/bin/busybox mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /new
# shellcheck source=/dev/null
. /settings
# shellcheck disable=SC2086
exec /bin/busybox switch_root /new /bin/sh "$ROOT/tests/kernel/guest.sh" "$ROOT" "$BIN" "$MODULES" $TESTS
