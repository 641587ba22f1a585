/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Service address -> backend, chosen once per socket (or per datagram). */
#pragma once

#include "common.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct isthmus_svc_key);
	__type(value, struct isthmus_svc_value);
} svc SEC(".maps");

/*
 * Backend ids, a run of slots per service. The agent writes it through mmap;
 * BPF_F_RDONLY_PROG would make the kernel refuse that mapping.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u32);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct isthmus_backend_value);
} backends SEC(".maps");

/* The agent makes and removes the entry together with the backend's. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct isthmus_backend_stats);
} backend_stats SEC(".maps");

/* Read and written by the agent only. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ISTHMUS_META_MAX);
	__type(key, __u32);
	__type(value, __u32);
} meta SEC(".maps");

enum service_result {
	SERVICE_NONE,		/* not a service address */
	SERVICE_FOUND,
	SERVICE_NO_BACKEND,
};

struct service_choice {
	struct isthmus_addr addr;
	__be16 port;
	__u16 pad;
	__u32 svc_id;
	__u32 backend_id;
};

/* Evenly spread over [0, count) without a division by a variable. */
static __always_inline __u32 scale(__u32 hash, __u32 count)
{
	return (__u32)(((__u64)hash * count) >> 32);
}

/* Cookies count up by one: the multiplication spreads them (Fibonacci hashing). */
static __always_inline __u32 hash_cookie(__u64 cookie)
{
	return (__u32)((cookie * 0x9e3779b97f4a7c15ULL) >> 32);
}

/*
 * @hash: a random number for TCP; the same number for all datagrams of one
 * socket, so that they reach one backend.
 *
 * The agent writes slots, flips the service, and only then removes what is not
 * used any more. A reader that saw the old service and no longer finds its
 * backend looks again and sees the new one.
 */
static __always_inline enum service_result
service_select(const struct isthmus_svc_key *key, __u32 hash, struct service_choice *choice)
{
	const struct isthmus_backend_value *backend;
	const struct isthmus_svc_value *service;
	__u32 slot, *backend_id;
	int attempt;

	for (attempt = 0; attempt < 3; attempt++) {
		service = bpf_map_lookup_elem(&svc, key);
		if (!service)
			return SERVICE_NONE;
		if (service->slot_count == 0)
			return SERVICE_NO_BACKEND;
		slot = service->slot_base + scale(hash, service->slot_count);
		backend_id = bpf_map_lookup_elem(&slots, &slot);
		if (!backend_id)
			continue;
		choice->backend_id = *backend_id;
		backend = bpf_map_lookup_elem(&backends, &choice->backend_id);
		if (!backend)
			continue;
		choice->addr = backend->addr;
		choice->port = backend->port;
		choice->svc_id = service->svc_id;
		return SERVICE_FOUND;
	}
	return SERVICE_NO_BACKEND;
}
