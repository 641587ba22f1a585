/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which workload the calling process belongs to. */
#pragma once

#include "common.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct isthmus_workload_value);
} workloads SEC(".maps");

/* Levels below the root of the hierarchy; a nested container is at about 8. */
#define WORKLOAD_MAX_DEPTH 24

/*
 * The workload of the current process: its cgroup or the nearest ancestor that
 * is one. The helper answers 0 for levels below the process's own.
 */
static __always_inline const struct isthmus_workload_value *workload_of_current(void)
{
	const struct isthmus_workload_value *workload;
	__u64 id;
	int level;

	for (level = WORKLOAD_MAX_DEPTH; level > 0; level--) {
		id = bpf_get_current_ancestor_cgroup_id(level);
		if (!id)
			continue;
		workload = bpf_map_lookup_elem(&workloads, &id);
		if (workload)
			return workload;
	}
	return NULL;
}
