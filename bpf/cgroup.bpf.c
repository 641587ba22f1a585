/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Socket hooks at the root of the cgroup2 hierarchy: a socket that dials a
 * service address is connected to a backend, and a workload's socket that dials
 * the mesh is bound to the workload's own address. No packet is touched.
 *
 * IPv4-mapped addresses on AF_INET6 sockets (JVM, .NET) come through connect6,
 * recvmsg6 and getpeername6, but through sendmsg4: udpv6_sendmsg() turns to
 * udp_sendmsg() before it runs a hook. Native IPv6 passes through.
 */
#include "lib/common.h"
#include "lib/ipcache.h"
#include "lib/namespace.h"
#include "lib/service.h"
#include "lib/workload.h"

#define AF_INET6	10

#define SOCK_STREAM	1
#define SOCK_DGRAM	2

#define EPROTO_TCP	6
#define EPROTO_UDP	17

#define EADDRNOTAVAIL	99
#define EHOSTUNREACH	113

#define PASS	1
#define REFUSE	0

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct isthmus_sock_value);
} socks SEC(".maps");

/*
 * LRU because a lost entry must never stop a connect(); sock_release keeps it
 * free of dead sockets, so that long-lived ones are not evicted.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, __u64);
	__type(value, struct isthmus_sock_backend);
} sock_backends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct isthmus_rev_key);
	__type(value, struct isthmus_rev_value);
} rev SEC(".maps");

/* user_port is 32 bits wide and holds the port, network order, in the low 16. */
static __always_inline __be16 user_port(const struct bpf_sock_addr *ctx)
{
	return (__be16)ctx->user_port;
}

/* Below the kernel that has bpf_set_retval() the application sees EPERM. */
static __always_inline int refuse(int error)
{
	if (config.flags & ISTHMUS_CONFIG_SET_RETVAL)
		bpf_set_retval(-error);
	return REFUSE;
}

/* The protocol number of a socket that services know, else 0. */
static __always_inline __u8 service_proto(const struct bpf_sock_addr *ctx)
{
	if (ctx->type == SOCK_STREAM && ctx->protocol == EPROTO_TCP)
		return EPROTO_TCP;
	if (ctx->type == SOCK_DGRAM && ctx->protocol == EPROTO_UDP)
		return EPROTO_UDP;
	return 0;
}

static __always_inline void count_backend(__u32 backend_id, bool connected)
{
	struct isthmus_backend_stats *stats = bpf_map_lookup_elem(&backend_stats, &backend_id);

	if (!stats)
		return;
	if (connected)
		stats->connects++;
	else
		stats->datagrams++;
}

/* A socket that dials anew is no longer connected to what it dialled before. */
static __always_inline void forget_backend(struct bpf_sock_addr *ctx)
{
	__u64 cookie;

	if (!bpf_sk_storage_get(&socks, ctx->sk, NULL, 0))
		return;
	bpf_sk_storage_delete(&socks, ctx->sk);
	cookie = bpf_get_socket_cookie(ctx);
	bpf_map_delete_elem(&sock_backends, &cookie);
}

static __always_inline void remember_backend(struct bpf_sock_addr *ctx, const struct isthmus_svc_key *key,
					     const struct service_choice *choice)
{
	struct isthmus_sock_backend by_cookie = {
		.svc_id = choice->svc_id,
		.backend_id = choice->backend_id,
	};
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct isthmus_sock_value *sock;

	/* Without memory for it the peer's name stays the backend's; the connection works. */
	sock = bpf_sk_storage_get(&socks, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (sock) {
		sock->vip = key->addr;
		sock->backend = choice->addr;
		sock->vport = key->port;
		sock->bport = choice->port;
		sock->backend_id = choice->backend_id;
		sock->svc_id = choice->svc_id;
	}
	bpf_map_update_elem(&sock_backends, &cookie, &by_cookie, BPF_ANY);
}

/* Turn the address of a new connection into its backend's. */
static __always_inline enum service_result
connect_service(struct bpf_sock_addr *ctx, const struct isthmus_addr *dst, struct service_choice *choice)
{
	struct isthmus_svc_key key = {
		.addr = *dst,
		.port = user_port(ctx),
		.proto = service_proto(ctx),
	};
	enum service_result result = SERVICE_NONE;
	__u32 hash;

	if (key.proto) {
		hash = key.proto == EPROTO_TCP ? bpf_get_prandom_u32() :
						 hash_cookie(bpf_get_socket_cookie(ctx));
		result = service_select(ctx, &key, hash, choice);
		if (result != SERVICE_NONE && is_untranslated(ctx))
			result = SERVICE_NONE;
	}
	if (result != SERVICE_FOUND) {
		forget_backend(ctx);
		return result;
	}
	remember_backend(ctx, &key, choice);
	count_backend(choice->backend_id, true);
	return result;
}

/*
 * The workload whose address this process should use towards @dst, or NULL: the
 * process is none, or @dst is not in the mesh (a node's underlay address is
 * reached without the overlay, so a mesh source would show on the underlay).
 */
static __always_inline const struct isthmus_workload_value *workload_towards(const struct isthmus_addr *dst)
{
	const struct isthmus_workload_value *workload = workload_of_current();
	const struct isthmus_ipcache_value *entry;

	if (!workload || addr_is_zero(&workload->addr4))
		return NULL;
	entry = ipcache_lookup(dst);
	if (!entry || (entry->flags & ISTHMUS_IPCACHE_NODE))
		return NULL;
	return workload;
}

/*
 * Verdict after bpf_bind(). A workload's address that is not on this host is a
 * fault: going on as the host would lend the workload the host's identity.
 * Other errors mean that the application chose a local port itself, which the
 * kernel does not let us change: it goes on with the host's address.
 */
static __always_inline int bound(long error)
{
	return error == -EADDRNOTAVAIL ? refuse(EADDRNOTAVAIL) : PASS;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct isthmus_addr dst = addr_from_v4(ctx->user_ip4);
	const struct isthmus_workload_value *workload;
	struct service_choice choice = {};

	switch (connect_service(ctx, &dst, &choice)) {
	case SERVICE_NO_BACKEND:
		return refuse(EHOSTUNREACH);
	case SERVICE_FOUND:
		if (!addr_is_v4(&choice.addr))
			return refuse(EHOSTUNREACH);
		dst = choice.addr;
		ctx->user_ip4 = dst.a[3];
		ctx->user_port = choice.port;
		break;
	case SERVICE_NONE:
		break;
	}

	if (ctx->sk->src_ip4)
		return PASS;
	workload = workload_towards(&dst);
	if (!workload)
		return PASS;
	struct sockaddr_in {
		__u16 sin_family;
		__be16 sin_port;
		__be32 sin_addr;
		__u8 sin_zero[8];
	} source = {
		.sin_family = AF_INET,
		.sin_addr = workload->addr4.a[3],
	};
	return bound(bpf_bind(ctx, (void *)&source, sizeof(source)));
}

/* Bound to :: or to ::ffff:0.0.0.0 means: not bound to an address. */
static __always_inline bool bound6(const struct bpf_sock_addr *ctx)
{
	return ctx->sk->src_ip4 || ctx->sk->src_ip6[0] || ctx->sk->src_ip6[1] || ctx->sk->src_ip6[3];
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct isthmus_addr dst = {
		.a = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] },
	};
	const struct isthmus_workload_value *workload;
	struct service_choice choice = {};

	if (!addr_is_v4(&dst)) {
		forget_backend(ctx);
		return PASS;
	}

	switch (connect_service(ctx, &dst, &choice)) {
	case SERVICE_NO_BACKEND:
		return refuse(EHOSTUNREACH);
	case SERVICE_FOUND:
		if (!addr_is_v4(&choice.addr))
			return refuse(EHOSTUNREACH);
		dst = choice.addr;
		ctx->user_ip6[3] = dst.a[3];
		ctx->user_port = choice.port;
		break;
	case SERVICE_NONE:
		break;
	}

	if (bound6(ctx))
		return PASS;
	workload = workload_towards(&dst);
	if (!workload)
		return PASS;
	struct sockaddr_in6 {
		__u16 sin6_family;
		__be16 sin6_port;
		__be32 sin6_flowinfo;
		__be32 sin6_addr[4];
		__u32 sin6_scope_id;
	} source = {
		.sin6_family = AF_INET6,
		.sin6_addr = { 0, 0, bpf_htonl(0xffff), workload->addr4.a[3] },
	};
	return bound(bpf_bind(ctx, (void *)&source, sizeof(source)));
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct isthmus_addr dst = addr_from_v4(ctx->user_ip4);
	struct isthmus_svc_key key = {
		.addr = dst,
		.port = user_port(ctx),
		.proto = EPROTO_UDP,
	};
	const struct isthmus_workload_value *workload;
	struct isthmus_rev_value name = {
		.vip = dst,
		.port = key.port,
	};
	struct service_choice choice = {};
	enum service_result result;
	struct isthmus_rev_value *known;
	struct isthmus_rev_key reply = {};

	if (ctx->protocol != EPROTO_UDP)
		return PASS;
	reply.cookie = bpf_get_socket_cookie(ctx);

	result = service_select(ctx, &key, hash_cookie(reply.cookie), &choice);
	if (result != SERVICE_NONE && is_untranslated(ctx))
		result = SERVICE_NONE;
	switch (result) {
	case SERVICE_NO_BACKEND:
		return refuse(EHOSTUNREACH);
	case SERVICE_FOUND:
		if (!addr_is_v4(&choice.addr))
			return refuse(EHOSTUNREACH);
		dst = choice.addr;
		reply.backend = choice.addr;
		reply.port = choice.port;
		known = bpf_map_lookup_elem(&rev, &reply);
		if (!known || !addr_equal(&known->vip, &name.vip) || known->port != name.port)
			bpf_map_update_elem(&rev, &reply, &name, BPF_ANY);
		ctx->user_ip4 = dst.a[3];
		ctx->user_port = choice.port;
		count_backend(choice.backend_id, false);
		break;
	case SERVICE_NONE:
		break;
	}

	/* Holds the bound address or the one of IP_PKTINFO, if any. */
	if (ctx->msg_src_ip4)
		return PASS;
	workload = workload_towards(&dst);
	if (workload)
		ctx->msg_src_ip4 = workload->addr4.a[3];
	return PASS;
}

/* Attached so that native IPv6 needs no new hook on a running host; see the top. */
SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx __attribute__((unused)))
{
	return PASS;
}

/* If @addr:@port is the backend of this socket's service: the service's. */
static __always_inline bool sock_service(struct bpf_sock_addr *ctx, const struct isthmus_addr *addr,
					 __be16 port, struct isthmus_rev_value *name)
{
	struct isthmus_sock_value *sock = bpf_sk_storage_get(&socks, ctx->sk, NULL, 0);

	if (!sock || sock->bport != port || !addr_equal(&sock->backend, addr))
		return false;
	name->vip = sock->vip;
	name->port = sock->vport;
	return true;
}

/* The same for a received datagram, whose socket need not be connected. */
static __always_inline bool datagram_service(struct bpf_sock_addr *ctx, const struct isthmus_addr *addr,
					     __be16 port, struct isthmus_rev_value *name)
{
	struct isthmus_rev_key key = {
		.backend = *addr,
		.port = port,
	};
	struct isthmus_rev_value *known;

	if (sock_service(ctx, addr, port, name))
		return true;
	key.cookie = bpf_get_socket_cookie(ctx);
	known = bpf_map_lookup_elem(&rev, &key);
	if (!known)
		return false;
	*name = *known;
	return true;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct isthmus_addr src = addr_from_v4(ctx->user_ip4);
	struct isthmus_rev_value name = {};

	if (datagram_service(ctx, &src, user_port(ctx), &name)) {
		ctx->user_ip4 = name.vip.a[3];
		ctx->user_port = name.port;
	}
	return PASS;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct isthmus_addr src = {
		.a = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] },
	};
	struct isthmus_rev_value name = {};

	if (addr_is_v4(&src) && datagram_service(ctx, &src, user_port(ctx), &name)) {
		ctx->user_ip6[3] = name.vip.a[3];
		ctx->user_port = name.port;
	}
	return PASS;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct isthmus_addr peer = addr_from_v4(ctx->user_ip4);
	struct isthmus_rev_value name = {};

	if (sock_service(ctx, &peer, user_port(ctx), &name)) {
		ctx->user_ip4 = name.vip.a[3];
		ctx->user_port = name.port;
	}
	return PASS;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct isthmus_addr peer = {
		.a = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] },
	};
	struct isthmus_rev_value name = {};

	if (addr_is_v4(&peer) && sock_service(ctx, &peer, user_port(ctx), &name)) {
		ctx->user_ip6[3] = name.vip.a[3];
		ctx->user_port = name.port;
	}
	return PASS;
}

SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);

	bpf_map_delete_elem(&sock_backends, &cookie);
	return PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
