/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What every program needs: headers, the configuration, addresses. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "../include/abi.h"

#define AF_INET		2

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif

/*
 * The only variable in .rodata, so it is at offset 0. The section is frozen
 * before the programs are verified: branches on it are folded, and a helper
 * that this kernel lacks may stand behind a flag.
 */
const volatile struct isthmus_config config = {};

static __always_inline struct isthmus_addr addr_from_v4(__be32 v4)
{
	return (struct isthmus_addr){ .a = { 0, 0, bpf_htonl(0xffff), v4 } };
}

static __always_inline bool addr_is_v4(const struct isthmus_addr *addr)
{
	return addr->a[0] == 0 && addr->a[1] == 0 && addr->a[2] == bpf_htonl(0xffff);
}

static __always_inline bool addr_is_zero(const struct isthmus_addr *addr)
{
	return !(addr->a[0] | addr->a[1] | addr->a[2] | addr->a[3]);
}

static __always_inline bool addr_equal(const struct isthmus_addr *x, const struct isthmus_addr *y)
{
	return x->a[0] == y->a[0] && x->a[1] == y->a[1] &&
	       x->a[2] == y->a[2] && x->a[3] == y->a[3];
}
