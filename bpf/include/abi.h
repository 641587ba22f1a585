/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Map ABI shared by the BPF programs and the agent.
 *
 * Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d, network order: one map set
 * and one code path serve both families. Fixed-width types, explicit padding;
 * a test compares every struct with its Python format through BTF.
 * The agent makes a pinned map of another geometry (type, sizes, flags) anew; the
 * old programs keep the old one until they are replaced. A value that changes its
 * meaning but not its size needs another map name.
 */
#pragma once

#include <linux/types.h>

#define ISTHMUS_ABI_VERSION 1

struct isthmus_addr {
	__be32 a[4];
};
_Static_assert(sizeof(struct isthmus_addr) == 16, "addr");

/* ipcache: who owns an address and through which node it is reached. */
struct isthmus_ipcache_value {
	struct isthmus_addr tunnel;	/* node's underlay address, all zero: local or none */
	__u32 identity;			/* numeric identity as on the wire */
	__u16 cluster_id;
	__u16 flags;			/* ISTHMUS_IPCACHE_* */
};
_Static_assert(sizeof(struct isthmus_ipcache_value) == 24, "ipcache value");

#define ISTHMUS_IPCACHE_NODE	(1 << 0)	/* an underlay address of a node */
/* A node's mesh, health or ingress address: it never moves; with CNI, the range of this node's pods: only those of them
 * that are published, in `local`, send and receive.
 */
#define ISTHMUS_IPCACHE_FIXED	(1 << 1)
#define ISTHMUS_IPCACHE_ENCRYPTED	(1 << 2)	/* packets to its tunnel go through WireGuard or not at all */
#define ISTHMUS_IPCACHE_NATIVE	(1 << 3)	/* packets may go to it and come from it by the underlay, without a tunnel */
#define ISTHMUS_IPCACHE_INSIDE	(1 << 4)	/* the same inside WireGuard, and by nothing else */
#define ISTHMUS_IPCACHE_CNI	(1 << 5)	/* a pod of this host's own Kubernetes cluster; with NODE: one of its nodes */

struct isthmus_lpm_key {
	__u32 prefixlen;		/* of the 128-bit form: v4 length + 96 */
	struct isthmus_addr addr;
};
_Static_assert(sizeof(struct isthmus_lpm_key) == 20, "lpm key");

/*
 * A node that may send us overlay packets, by outer source address: any of its
 * underlay addresses. @endpoint is what stands in the ipcache for what is behind it.
 */
struct isthmus_peer_value {
	struct isthmus_addr endpoint;
	__u16 cluster_id;
	__u16 flags;			/* ISTHMUS_PEER_* */
};
_Static_assert(sizeof(struct isthmus_peer_value) == 20, "peer value");

#define ISTHMUS_PEER_ENCRYPTED	(1 << 0)	/* its packets come through WireGuard or are dropped */
#define ISTHMUS_PEER_NATIVE	(1 << 1)	/* its packets come without a tunnel or are dropped */

/*
 * The WireGuard devices, in the one element of the map `wireguard`; all zero: there
 * is none. A second one is there while the host's key is replaced.
 */
struct isthmus_wireguard {
	__u32 ifindex;
	__u32 second;
	__be16 port;			/* of the overlay, UDP */
	__u16 pad;
	__be32 underlay4;		/* this host's address */
	__be32 advertised4;		/* where others send to, another one where a NAT is on the way */
};

/*
 * Native routing, in the one element of the map `native`; all zero: there is none, and the underlay devices' programs
 * let everything go by.
 */
struct isthmus_native {
	__u32 ifindex;			/* the overlay device, which asks for routes */
	__be32 underlay4;		/* this host's address */
};

/*
 * What the WireGuard devices' program writes as a packet's mark, one of two by the
 * device. It survives the decapsulation and tells the overlay's program how the
 * packet came; that program clears it. With one that came without a tunnel it goes
 * to the kernel's check of sources. Only the lowest byte counts: Calico and
 * kube-proxy use higher bits.
 */
#define ISTHMUS_MARK_MASK	0xff
#define ISTHMUS_MARK_DECRYPTED	0x49
#define ISTHMUS_MARK_DECRYPTED_SECOND	0x4a
/* 0x4b is MASQUERADED of agent/isthmus_agent/desired/datapath.py, which no program looks at. */
#define ISTHMUS_MARK_NATIVE	0x4e	/* came by the underlay without a tunnel: for the kernel's check of sources */
/* Written by a socket: its packets go through the tunnel whole or not at all, so that who sends them learns what the
 * way carries. */
#define ISTHMUS_MARK_WHOLE	0x4f

/* An address of this host: which identity its packets carry. */
struct isthmus_local_value {
	__u32 identity;
	__u32 flags;
};

/* A workload, by cgroup id: the address its sockets are bound to. */
struct isthmus_workload_value {
	struct isthmus_addr addr4;
	struct isthmus_addr addr6;
};

struct isthmus_svc_key {
	struct isthmus_addr addr;
	__be16 port;
	__u8 proto;
	__u8 scope;			/* 0; others reserved for packet hooks */
};
_Static_assert(sizeof(struct isthmus_svc_key) == 20, "svc key");

struct isthmus_svc_value {
	__u32 svc_id;
	__u32 slot_base;
	__u32 slot_count;		/* 0: no backend, the call fails with EHOSTUNREACH */
	__u32 affinity;			/* seconds for which a client that comes again gets the backend it had; 0: none */
};

struct isthmus_backend_value {
	struct isthmus_addr addr;
	__be16 port;
	__u8 proto;
	__u8 state;
	__u32 cluster_id;
};
_Static_assert(sizeof(struct isthmus_backend_value) == 24, "backend value");

struct isthmus_backend_stats {
	__u64 connects;			/* connect() calls sent to this backend */
	__u64 datagrams;		/* unconnected datagrams sent to it */
};

/* Kept with a connected socket, freed with it. */
struct isthmus_sock_value {
	struct isthmus_addr vip;
	struct isthmus_addr backend;
	__be16 vport;
	__be16 bport;
	__u32 backend_id;
	__u32 svc_id;
	__u32 pad;
};

/* Which backend a connected socket uses, by cookie, so that the agent can end
 * exactly these sockets when the backend is gone.
 */
struct isthmus_sock_backend {
	__u32 svc_id;
	__u32 backend_id;
};

/* Session affinity: which backend of a service a client had last. */
struct isthmus_affinity_key {
	__u64 client;			/* cookie of the network namespace, or a workload's address and the top bit */
	__u32 svc_id;
	__u32 pad;
};

struct isthmus_affinity_value {
	__u64 used;			/* ns since boot */
	__u32 backend_id;
	__u32 pad;
};

/* Unconnected datagram sockets: what a reply's source must be turned into. */
struct isthmus_rev_key {
	__u64 cookie;
	struct isthmus_addr backend;
	__be16 port;
	__u16 pad[3];
};
_Static_assert(sizeof(struct isthmus_rev_key) == 32, "rev key");

struct isthmus_rev_value {
	struct isthmus_addr vip;
	__be16 port;
	__u16 pad;
};

/* What arrived, by receiver and sender's identity. */
struct isthmus_ident_key {
	struct isthmus_addr dst;
	__u32 identity;
	__u16 cluster_id;
	__u16 pad;
};

struct isthmus_counter {
	__u64 packets;
	__u64 bytes;
};

/* Index of the drops map; append only, never renumber. */
enum isthmus_drop {
	ISTHMUS_DROP_NONE = 0,
	ISTHMUS_DROP_UNKNOWN_PEER,	/* outer source is no node of the mesh */
	ISTHMUS_DROP_BAD_IDENTITY,	/* VNI not the sender's to assert */
	ISTHMUS_DROP_BAD_SOURCE,	/* inner source not the sender's or its cluster's */
	ISTHMUS_DROP_NO_TUNNEL,		/* destination not in the ipcache */
	ISTHMUS_DROP_NOT_LOCAL_SOURCE,	/* egress from an address that is not ours */
	ISTHMUS_DROP_MALFORMED,
	ISTHMUS_DROP_NOT_IP,
	ISTHMUS_DROP_TUNNEL_KEY,	/* the kernel refused the tunnel key */
	ISTHMUS_DROP_NOT_LOCAL_DEST,	/* arrived here for an address that is not ours */
	ISTHMUS_DROP_NOT_ENCRYPTED,	/* to or from a peer that is to be encrypted, and WireGuard was not in the way */
	ISTHMUS_DROP_NOT_OVERLAY,	/* came through WireGuard, is no whole packet of the overlay and may not come without */
	ISTHMUS_DROP_WRONG_WAY,		/* natively to or from where the tunnel leads, or the other way round */
	ISTHMUS_DROP_MAX = 16,
};

/* Load-time constants, one struct at offset 0 of .rodata. */
struct isthmus_config {
	__u32 cluster_id;
	__u32 identity_shift;		/* 16, or 15 with 511 clusters */
	__u32 flags;			/* ISTHMUS_CONFIG_* */
};

#define ISTHMUS_CONFIG_SET_RETVAL	(1 << 0)	/* the kernel has bpf_set_retval here */

/* Index of the meta map: what must survive a restart of the agent. */
enum isthmus_meta {
	ISTHMUS_META_BACKEND_ID = 0,	/* last backend id dealt */
	ISTHMUS_META_SERVICE_ID,	/* last service id dealt */
	ISTHMUS_META_MAX = 4,
};
