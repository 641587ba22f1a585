/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Service address -> backend, chosen once per socket (or per datagram). */
#pragma once

#include "common.h"
#include "workload.h"

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

/* LRU because a client that is forgotten only has its backend chosen anew. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct isthmus_affinity_key);
	__type(value, struct isthmus_affinity_value);
} affinity SEC(".maps");

#define NSEC_PER_SEC	1000000000ULL

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
 * Who is one client: a workload, for those of a host share its network
 * namespace, else all of a namespace, which is a pod or the host.
 */
static __always_inline __u64 client_of(struct bpf_sock_addr *ctx)
{
	const struct isthmus_workload_value *workload = workload_of_current();

	if (workload && !addr_is_zero(&workload->addr4))
		return 1ULL << 63 | workload->addr4.a[3];
	return bpf_get_netns_cookie(ctx);
}

/* Whether a backend gets new flows of a service: its slots are in ascending order. */
static __always_inline bool serves(const struct isthmus_svc_value *service, __u32 backend_id)
{
	__u32 low = 0, high = service->slot_count, slot, *found;
	int step;

	/* One more than the bits of the number of all slots. */
	for (step = 0; step < 21 && low < high; step++) {
		__u32 middle = low + (high - low) / 2;

		slot = service->slot_base + middle;
		found = bpf_map_lookup_elem(&slots, &slot);
		if (!found)
			return false;
		if (*found == backend_id)
			return true;
		if (*found < backend_id)
			low = middle + 1;
		else
			high = middle;
	}
	return false;
}

/* @backend_id becomes the one that the client had, while that serves and not too much time went by. */
static __always_inline void keep_backend(const struct isthmus_svc_value *service,
					 const struct isthmus_affinity_key *client, __u32 *backend_id)
{
	const struct isthmus_affinity_value *had = bpf_map_lookup_elem(&affinity, client);

	if (had && bpf_ktime_get_boot_ns() - had->used < service->affinity * NSEC_PER_SEC &&
	    serves(service, had->backend_id))
		*backend_id = had->backend_id;
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
service_select(struct bpf_sock_addr *ctx, const struct isthmus_svc_key *key, __u32 hash,
	       struct service_choice *choice)
{
	const struct isthmus_backend_value *backend;
	const struct isthmus_svc_value *service;
	struct isthmus_affinity_value now = {};
	struct isthmus_affinity_key client = {};
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
		if (service->affinity) {
			client.client = client_of(ctx);
			client.svc_id = service->svc_id;
			keep_backend(service, &client, &choice->backend_id);
		}
		backend = bpf_map_lookup_elem(&backends, &choice->backend_id);
		if (!backend)
			continue;
		choice->addr = backend->addr;
		choice->port = backend->port;
		choice->svc_id = service->svc_id;
		if (service->affinity) {
			now.used = bpf_ktime_get_boot_ns();
			now.backend_id = choice->backend_id;
			bpf_map_update_elem(&affinity, &client, &now, BPF_ANY);
		}
		return SERVICE_FOUND;
	}
	return SERVICE_NO_BACKEND;
}
