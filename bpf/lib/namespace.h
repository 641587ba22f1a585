/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Pods whose sockets are left alone: something in them must see service addresses. */
#pragma once

#include "common.h"

/* By the cookie of the network namespace, which no other one ever has while the kernel runs. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u32);
} untranslated SEC(".maps");

static __always_inline bool is_untranslated(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);

	return bpf_map_lookup_elem(&untranslated, &cookie);
}
