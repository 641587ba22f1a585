/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Who owns an address, and behind which node it is. */
#pragma once

#include "common.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct isthmus_addr);
	__type(value, struct isthmus_ipcache_value);
} ipcache_host SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct isthmus_lpm_key);
	__type(value, struct isthmus_ipcache_value);
} ipcache_cidr SEC(".maps");

/* Single addresses first: a hash costs a fifth of a trie walk. */
static __always_inline const struct isthmus_ipcache_value *
ipcache_lookup(const struct isthmus_addr *addr)
{
	struct isthmus_lpm_key key = { .prefixlen = 128, .addr = *addr };
	const struct isthmus_ipcache_value *value;

	value = bpf_map_lookup_elem(&ipcache_host, addr);
	if (value)
		return value;
	return bpf_map_lookup_elem(&ipcache_cidr, &key);
}
