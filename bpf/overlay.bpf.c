/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The overlay: tc programs on the collect-metadata VXLAN device, on the WireGuard
 * device that its packets go through to some peers, and on the underlay devices
 * where packets go without a tunnel to some.
 *
 * The numeric identity of the sender travels in the VNI (Cilium's format).
 * What is not IPv4 is dropped and counted: the device is NOARP and no neighbour
 * is ever resolved through the tunnel.
 */
#include "lib/common.h"
#include "lib/ipcache.h"

#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#define TUNNEL_TTL 64
#define IP_FRAGMENT_MASK 0x3fff	/* more fragments, and the offset */
/* linux/icmp.h, which needs a C library of the target. */
#define ICMP_DEST_UNREACH 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12

/* Newer fields stand behind it; kernels from 4.9 to now accept this length. */
#define TUNNEL_KEY_SIZE \
	(offsetof(struct bpf_tunnel_key, tunnel_label) + sizeof(((struct bpf_tunnel_key *)0)->tunnel_label))

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct isthmus_addr);
	__type(value, struct isthmus_local_value);
} local SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct isthmus_addr);
	__type(value, struct isthmus_peer_value);
} peers SEC(".maps");

/* Bounded: the destination is one of ours, the identity one that its peer may assert. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_PERCPU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct isthmus_ident_key);
	__type(value, struct isthmus_counter);
} identities SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, ISTHMUS_DROP_MAX);
	__type(key, __u32);
	__type(value, struct isthmus_counter);
} drops SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct isthmus_wireguard);
} wireguard SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct isthmus_native);
} native SEC(".maps");

static __always_inline int drop(const struct __sk_buff *skb, enum isthmus_drop reason)
{
	__u32 index = reason;
	struct isthmus_counter *counter = bpf_map_lookup_elem(&drops, &index);

	if (counter) {
		counter->packets++;
		counter->bytes += skb->len;
	}
	return TC_ACT_SHOT;
}

struct packet {
	struct isthmus_addr src;
	struct isthmus_addr dst;
};

/* Inner addresses of either family in the form of the maps; NONE, or why not. */
static __always_inline enum isthmus_drop parse(struct __sk_buff *skb, struct packet *packet)
{
	struct iphdr ip;

	if (skb->protocol != bpf_htons(ETH_P_IP))
		return ISTHMUS_DROP_NOT_IP;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.version != 4)
		return ISTHMUS_DROP_MALFORMED;
	packet->src = addr_from_v4(ip.saddr);
	packet->dst = addr_from_v4(ip.daddr);
	return ISTHMUS_DROP_NONE;
}

/*
 * From an underlay address of ours to another node's: such a packet is here
 * only because its route was chosen before its source was translated back (the
 * reply of a pod behind a NodePort that the other node dialled at our underlay
 * address). Its way is the one that the request came.
 */
static __always_inline bool is_underlay_reply(const struct isthmus_addr *src, const struct isthmus_ipcache_value *dst)
{
	const struct isthmus_ipcache_value *source;

	if (!(dst->flags & ISTHMUS_IPCACHE_NODE))
		return false;
	source = ipcache_lookup(src);
	return source && (source->flags & ISTHMUS_IPCACHE_NODE) && addr_is_zero(&source->tunnel);
}

/*
 * Whether the node at @tunnel takes nothing through the tunnel. Routes lead to it
 * natively; this is what keeps a packet from leaving by the tunnel all the same.
 */
static __always_inline bool is_only_native(const struct isthmus_addr *tunnel)
{
	const struct isthmus_peer_value *peer;
	const struct isthmus_native *here;
	__u32 index = 0;

	here = bpf_map_lookup_elem(&native, &index);
	if (!here || !here->ifindex)
		return false;
	peer = bpf_map_lookup_elem(&peers, tunnel);
	return peer && peer->flags & ISTHMUS_PEER_NATIVE;
}

/* The device of the way without us, 0 if there is none. */
static __always_inline __u32 underlay_device(struct __sk_buff *skb, const struct packet *packet)
{
	struct bpf_fib_lookup fib = {
		.family = AF_INET,
		.ifindex = skb->ifindex,
		.ipv4_src = packet->src.a[3],
		.ipv4_dst = packet->dst.a[3],
	};
	long result = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);

	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
		return 0;
	return fib.ifindex == skb->ifindex ? 0 : fib.ifindex;
}

/*
 * Whether the outer packet to @tunnel will leave through WireGuard, by the same
 * lookup that the VXLAN device does next. Routes and rules make it so; this is
 * what keeps a packet from leaving in clear when somebody removed them, or the
 * device is gone. The device needs forwarding on, or the helper refuses.
 */
static __always_inline bool goes_through_wireguard(struct __sk_buff *skb, const struct isthmus_addr *tunnel)
{
	struct bpf_fib_lookup fib = { .family = AF_INET, .l4_protocol = IPPROTO_UDP };
	const struct isthmus_wireguard *device;
	__u32 index = 0;

	device = bpf_map_lookup_elem(&wireguard, &index);
	if (!device || !addr_is_v4(tunnel))
		return false;
	fib.ifindex = skb->ifindex;
	fib.dport = device->port;
	fib.ipv4_dst = tunnel->a[3];
	/* A positive answer is about the neighbour, which WireGuard has none of. */
	return bpf_fib_lookup(skb, &fib, sizeof(fib), 0) >= 0 &&
	       (fib.ifindex == device->ifindex || fib.ifindex == device->second);
}

SEC("tc")
int overlay_egress(struct __sk_buff *skb)
{
	const struct isthmus_ipcache_value *entry;
	const struct isthmus_local_value *source;
	struct bpf_tunnel_key key = {};
	struct packet packet = {};
	enum isthmus_drop reason;
	__u32 device;
	__u64 flags;

	reason = parse(skb, &packet);
	if (reason)
		return drop(skb, reason);

	source = bpf_map_lookup_elem(&local, &packet.src);
	if (!source)
		return drop(skb, ISTHMUS_DROP_NOT_LOCAL_SOURCE);

	entry = ipcache_lookup(&packet.dst);
	if (!entry || addr_is_zero(&entry->tunnel))
		return drop(skb, ISTHMUS_DROP_NO_TUNNEL);

	if (is_underlay_reply(&packet.src, entry)) {
		device = underlay_device(skb, &packet);
		if (device)
			return bpf_redirect_neigh(device, NULL, 0, 0);
	}

	if (is_only_native(&entry->tunnel))
		return drop(skb, ISTHMUS_DROP_WRONG_WAY);

	flags = 0;
	if ((skb->mark & ISTHMUS_MARK_MASK) == ISTHMUS_MARK_WHOLE) {
		skb->mark = 0;
		flags = BPF_F_DONT_FRAGMENT;
	}
	if (entry->flags & ISTHMUS_IPCACHE_ENCRYPTED) {
		/* The helper does not look at the mark: the device must not either. */
		skb->mark = 0;
		if (!goes_through_wireguard(skb, &entry->tunnel))
			return drop(skb, ISTHMUS_DROP_NOT_ENCRYPTED);
		/* The other side takes no fragments, among which clear ones could be mixed. */
		flags = BPF_F_DONT_FRAGMENT;
	}

	key.tunnel_id = source->identity;
	key.tunnel_ttl = TUNNEL_TTL;
	if (addr_is_v4(&entry->tunnel)) {
		key.remote_ipv4 = bpf_ntohl(entry->tunnel.a[3]);
		/* As Cilium sends: no outer checksum over IPv4, which alone allows that. */
		flags |= BPF_F_ZERO_CSUM_TX;
	} else {
		__builtin_memcpy(key.remote_ipv6, entry->tunnel.a, sizeof(key.remote_ipv6));
		flags |= BPF_F_TUNINFO_IPV6;
	}
	if (bpf_skb_set_tunnel_key(skb, &key, TUNNEL_KEY_SIZE, flags))
		return drop(skb, ISTHMUS_DROP_TUNNEL_KEY);
	return TC_ACT_OK;
}

/* Outer source of a received packet, false if it came through no tunnel. */
static __always_inline bool outer_source(struct __sk_buff *skb, struct isthmus_addr *outer, __u32 *identity)
{
	struct bpf_tunnel_key key = {};

	if (!bpf_skb_get_tunnel_key(skb, &key, TUNNEL_KEY_SIZE, 0)) {
		*outer = addr_from_v4(bpf_htonl(key.remote_ipv4));
	} else if (!bpf_skb_get_tunnel_key(skb, &key, TUNNEL_KEY_SIZE, BPF_F_TUNINFO_IPV6)) {
		__builtin_memcpy(outer->a, key.remote_ipv6, sizeof(outer->a));
	} else {
		return false;
	}
	*identity = key.tunnel_id;
	return true;
}

/*
 * What a node of @cluster_id may say it is: an identity of its cluster's own
 * range, or one of the fixed ones that a Cilium node sends (world, health,
 * remote-node, kube-apiserver, ingress, and the well-known and reserved ones).
 */
static __always_inline bool identity_allowed(__u32 identity, __u16 cluster_id)
{
	if (identity >> config.identity_shift)
		return identity >> config.identity_shift == cluster_id;
	return identity == 2 || identity == 4 || (identity >= 6 && identity <= 8) ||
	       (identity >= 100 && identity <= 114) || (identity >= 128 && identity <= 255);
}

static __always_inline bool is_local(const struct isthmus_addr *addr)
{
	const struct isthmus_ipcache_value *entry;

	if (bpf_map_lookup_elem(&local, addr))
		return true;
	entry = ipcache_lookup(addr);
	return entry && addr_is_zero(&entry->tunnel) &&
	       !(entry->flags & (ISTHMUS_IPCACHE_NODE | ISTHMUS_IPCACHE_FIXED)) &&
	       entry->cluster_id == config.cluster_id;
}

/* Whether an address is the host's own on the underlay: the one that others send to may be there as well. */
static __always_inline bool is_of_host(const struct isthmus_addr *addr)
{
	const struct isthmus_ipcache_value *entry = ipcache_lookup(addr);

	return entry && entry->flags & ISTHMUS_IPCACHE_NODE && addr_is_zero(&entry->tunnel);
}

/*
 * Whether the host would send the packet on, in clear: the address that others
 * send to may be one that a NAT in front of the host has, and not the host.
 */
static __always_inline bool is_elsewhere(struct __sk_buff *skb, const struct packet *packet)
{
	return is_of_host(&packet->dst) && underlay_device(skb, packet);
}

/*
 * The inner source must be behind the sending node, or belong to its cluster
 * (a workload that just moved there) without being a node's own address. It can
 * never be an address of this host. The node may have sent from another of its
 * addresses than the endpoint that others send to.
 */
static __always_inline bool source_allowed(const struct isthmus_addr *src, const struct isthmus_peer_value *peer)
{
	const struct isthmus_ipcache_value *entry;

	if (bpf_map_lookup_elem(&local, src))
		return false;
	entry = ipcache_lookup(src);
	if (!entry)
		return false;
	if (addr_equal(&entry->tunnel, &peer->endpoint))
		return true;
	return entry->cluster_id == peer->cluster_id &&
	       !(entry->flags & (ISTHMUS_IPCACHE_NODE | ISTHMUS_IPCACHE_FIXED));
}

static __always_inline void count_identity(const struct __sk_buff *skb, const struct isthmus_ident_key *key)
{
	struct isthmus_counter first = { .packets = 1, .bytes = skb->len };
	struct isthmus_counter *counter = bpf_map_lookup_elem(&identities, key);

	if (counter) {
		counter->packets++;
		counter->bytes += skb->len;
	} else {
		bpf_map_update_elem(&identities, key, &first, BPF_NOEXIST);
	}
}

static __always_inline bool is_decrypted(__u32 mark)
{
	return (mark & ISTHMUS_MARK_MASK) == ISTHMUS_MARK_DECRYPTED ||
	       (mark & ISTHMUS_MARK_MASK) == ISTHMUS_MARK_DECRYPTED_SECOND;
}

SEC("tc")
int overlay_ingress(struct __sk_buff *skb)
{
	const struct isthmus_peer_value *peer;
	struct isthmus_ident_key seen = {};
	struct isthmus_addr outer = {};
	struct packet packet = {};
	enum isthmus_drop reason;
	__u32 identity = 0;

	if (!outer_source(skb, &outer, &identity))
		return drop(skb, ISTHMUS_DROP_UNKNOWN_PEER);
	peer = bpf_map_lookup_elem(&peers, &outer);
	if (!peer)
		return drop(skb, ISTHMUS_DROP_UNKNOWN_PEER);
	if (is_decrypted(skb->mark))
		skb->mark = 0;
	else if (peer->flags & ISTHMUS_PEER_ENCRYPTED)
		return drop(skb, ISTHMUS_DROP_NOT_ENCRYPTED);
	if (peer->flags & ISTHMUS_PEER_NATIVE)
		return drop(skb, ISTHMUS_DROP_WRONG_WAY);

	reason = parse(skb, &packet);
	if (reason)
		return drop(skb, reason);
	if (!identity_allowed(identity, peer->cluster_id))
		return drop(skb, ISTHMUS_DROP_BAD_IDENTITY);
	if (!source_allowed(&packet.src, peer))
		return drop(skb, ISTHMUS_DROP_BAD_SOURCE);
	if (!is_local(&packet.dst) || is_elsewhere(skb, &packet))
		return drop(skb, ISTHMUS_DROP_NOT_LOCAL_DEST);

	seen.dst = packet.dst;
	seen.identity = identity;
	seen.cluster_id = peer->cluster_id;
	count_identity(skb, &seen);

	/* A Cilium node does not know our MAC: without this the stack takes the frame for another host's. */
	bpf_skb_change_type(skb, PACKET_HOST);
	return TC_ACT_OK;
}

/* What a NAT does to packets on the underlay, and cannot do to those inside WireGuard. */
static __always_inline bool translate(struct __sk_buff *skb, const struct iphdr *ip, const struct udphdr *udp, __be32 to)
{
	const __u32 check = offsetof(struct iphdr, check), daddr = offsetof(struct iphdr, daddr);
	__u32 udp_check = ip->ihl * 4 + offsetof(struct udphdr, check);

	if (udp->check && bpf_l4_csum_replace(skb, udp_check, ip->daddr, to, BPF_F_PSEUDO_HDR | sizeof(to)))
		return false;
	return !bpf_l3_csum_replace(skb, check, ip->daddr, to, sizeof(to)) &&
	       !bpf_skb_store_bytes(skb, daddr, &to, sizeof(to), 0);
}

/*
 * What came through WireGuard without a tunnel: from a node that may send so, to an
 * address of ours. The sender's identity is that of the source address.
 */
static __always_inline enum isthmus_drop take_inside(struct __sk_buff *skb, const struct iphdr *ip, __be32 underlay4)
{
	struct packet packet = { .src = addr_from_v4(ip->saddr), .dst = addr_from_v4(ip->daddr) };
	const struct isthmus_ipcache_value *entry = ipcache_lookup(&packet.src);
	struct isthmus_ident_key seen = { .dst = packet.dst };

	if (!entry || !(entry->flags & ISTHMUS_IPCACHE_INSIDE))
		return ISTHMUS_DROP_NOT_OVERLAY;
	/* From host to host everything comes by the underlay; only replies of workloads are ours. */
	if (ip->daddr == underlay4 ? entry->flags & ISTHMUS_IPCACHE_NODE
				   : !is_local(&packet.dst) || is_elsewhere(skb, &packet))
		return ISTHMUS_DROP_NOT_LOCAL_DEST;
	seen.identity = entry->identity;
	seen.cluster_id = entry->cluster_id;
	count_identity(skb, &seen);
	return ISTHMUS_DROP_NONE;
}

/*
 * WireGuard has checked that the source is the peer's (allowed IPs). Only whole
 * overlay packets to this host go on, and from nodes that send without a tunnel those
 * to addresses of ours: everything else that peers send us comes by the underlay,
 * where the host's own firewall expects it, and a host that forwards must not send on
 * in clear what came encrypted.
 */
SEC("tc")
int wireguard_ingress(struct __sk_buff *skb)
{
	const struct isthmus_wireguard *device;
	enum isthmus_drop reason;
	struct udphdr udp;
	struct iphdr ip;
	bool is_overlay;
	__u32 index = 0;

	device = bpf_map_lookup_elem(&wireguard, &index);
	if (!device || skb->protocol != bpf_htons(ETH_P_IP) || bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)) ||
	    ip.version != 4)
		return drop(skb, ISTHMUS_DROP_NOT_OVERLAY);
	is_overlay = ip.protocol == IPPROTO_UDP && !(ip.frag_off & bpf_htons(IP_FRAGMENT_MASK)) &&
		     !bpf_skb_load_bytes(skb, ip.ihl * 4, &udp, sizeof(udp)) && udp.dest == device->port;
	if (!is_overlay || (ip.daddr != device->underlay4 &&
			    (ip.daddr != device->advertised4 || !translate(skb, &ip, &udp, device->underlay4)))) {
		reason = take_inside(skb, &ip, device->underlay4);
		if (reason)
			return drop(skb, is_overlay ? ISTHMUS_DROP_NOT_LOCAL_DEST : reason);
	}
	skb->mark = skb->ifindex == device->second ? ISTHMUS_MARK_DECRYPTED_SECOND : ISTHMUS_MARK_DECRYPTED;
	return TC_ACT_OK;
}

/*
 * Nothing goes into WireGuard with an address that is not ours, as nothing does over the
 * overlay: a pod that is not published, or whatever a host's own rules made of a source.
 */
SEC("tc")
int wireguard_egress(struct __sk_buff *skb)
{
	struct isthmus_addr source;
	struct iphdr ip;

	if (skb->protocol != bpf_htons(ETH_P_IP) || bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return TC_ACT_OK;	/* allowed IPs have no such address */
	source = addr_from_v4(ip.saddr);
	if (!bpf_map_lookup_elem(&local, &source))
		return drop(skb, ISTHMUS_DROP_NOT_LOCAL_SOURCE);
	return TC_ACT_OK;
}

/* Errors about packets of ours come from any router on the way; the stack compares them with its sockets. */
static __always_inline bool is_icmp_error(const struct __sk_buff *skb, const struct iphdr *ip)
{
	__u8 type;

	if (ip->protocol != IPPROTO_ICMP || ip->frag_off & bpf_htons(IP_FRAGMENT_MASK) ||
	    bpf_skb_load_bytes_relative(skb, ip->ihl * 4, &type, sizeof(type), BPF_HDR_START_NET))
		return false;
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

static __always_inline bool is_pod(const struct isthmus_ipcache_value *entry)
{
	return entry && (entry->flags & (ISTHMUS_IPCACHE_CNI | ISTHMUS_IPCACHE_NODE)) == ISTHMUS_IPCACHE_CNI;
}

/*
 * Whether an address that is not in `local` is one that the CNI deals to pods of this
 * node: none is published there, or not yet, so that nothing of the mesh may come from
 * it or go to it.
 */
static __always_inline bool is_unpublished(const struct isthmus_ipcache_value *entry)
{
	return is_pod(entry) && entry->flags & ISTHMUS_IPCACHE_FIXED && addr_is_zero(&entry->tunnel);
}

/*
 * Whether a packet by the underlay is the CNI's and not ours: between pods of this
 * host's own Kubernetes cluster, between these and its nodes, and between pods and what
 * is not in the mesh, which not every CNI masquerades. A host of the cluster that is no
 * node may have a route of its own to the pods; their way to it is the mesh's.
 */
static __always_inline bool is_left_to_cni(const struct isthmus_ipcache_value *from,
					   const struct isthmus_ipcache_value *to)
{
	if (is_pod(to) && (!from || from->flags & ISTHMUS_IPCACHE_CNI ||
			   (from->flags & ISTHMUS_IPCACHE_NODE && from->cluster_id == config.cluster_id)))
		return true;
	return is_pod(from) && (!to || to->flags & ISTHMUS_IPCACHE_CNI);
}

/*
 * Whether a packet may come from the node at @endpoint. Where the underlay leads
 * to it directly, the sender is who has its link-layer address; one whose address
 * is not known yet has not been asked for, and is let in. From behind a router
 * comes what the network lets through. The overlay device asks, as in
 * goes_through_wireguard().
 */
static __always_inline bool may_come_from(struct __sk_buff *skb, const struct isthmus_addr *endpoint, __u32 ifindex)
{
	struct bpf_fib_lookup fib = {
		.family = AF_INET,
		.ifindex = ifindex,
		.ipv4_dst = endpoint->a[3],
	};
	__u64 neighbour = 0, sender = 0;
	long result;

	if (!addr_is_v4(endpoint))
		return false;
	result = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if (result == BPF_FIB_LKUP_RET_NO_NEIGH || (result >= 0 && fib.ipv4_dst != endpoint->a[3]))
		return true;
	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return false;
	__builtin_memcpy(&neighbour, fib.dmac, ETH_ALEN);
	if (!neighbour)
		return true;	/* a device without link-layer addresses */
	return !bpf_skb_load_bytes_relative(skb, offsetof(struct ethhdr, h_source), &sender, ETH_ALEN,
					    BPF_HDR_START_MAC) &&
	       sender == neighbour;
}

/*
 * On the underlay devices of a host that has nodes it talks to without a tunnel.
 * The sender's identity is that of the source address. What is neither to nor
 * from an address of the mesh, and what is the CNI's, goes by untouched, to programs
 * of others too.
 */
SEC("tc")
int underlay_ingress(struct __sk_buff *skb)
{
	const struct isthmus_ipcache_value *entry, *receiver;
	const struct isthmus_native *here;
	struct isthmus_ident_key seen = {};
	struct isthmus_addr source;
	bool to_underlay, is_published, is_native, is_inside;
	struct iphdr ip;
	__u32 index = 0;

	here = bpf_map_lookup_elem(&native, &index);
	if (!here || !here->ifindex || skb->protocol != bpf_htons(ETH_P_IP) ||
	    bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET))
		return TC_ACT_UNSPEC;
	seen.dst = addr_from_v4(ip.daddr);
	to_underlay = ip.daddr == here->underlay4;
	receiver = ipcache_lookup(&seen.dst);
	is_published = to_underlay || bpf_map_lookup_elem(&local, &seen.dst);
	if (!is_published && !is_unpublished(receiver))
		return TC_ACT_UNSPEC;

	source = addr_from_v4(ip.saddr);
	entry = ipcache_lookup(&source);
	is_native = entry && entry->flags & ISTHMUS_IPCACHE_NATIVE;
	is_inside = entry && entry->flags & ISTHMUS_IPCACHE_INSIDE;
	/* To the host itself everything comes by the underlay; only replies of workloads are ours. */
	if (to_underlay && (!(is_native || is_inside) || entry->flags & ISTHMUS_IPCACHE_NODE))
		return TC_ACT_UNSPEC;
	if (is_left_to_cni(entry, receiver))
		return TC_ACT_UNSPEC;
	if (!is_native) {
		if (is_icmp_error(skb, &ip))
			return TC_ACT_UNSPEC;
		if (is_inside && !(entry->flags & ISTHMUS_IPCACHE_NODE))
			return drop(skb, ISTHMUS_DROP_NOT_ENCRYPTED);
		if (is_of_host(&seen.dst))
			return TC_ACT_UNSPEC;
		if (!entry)
			return drop(skb, ISTHMUS_DROP_UNKNOWN_PEER);
		if (is_inside)
			return drop(skb, ISTHMUS_DROP_NOT_ENCRYPTED);
		return drop(skb, addr_is_zero(&entry->tunnel) ? ISTHMUS_DROP_BAD_SOURCE : ISTHMUS_DROP_WRONG_WAY);
	}
	if (!may_come_from(skb, &entry->tunnel, here->ifindex))
		return drop(skb, ISTHMUS_DROP_BAD_SOURCE);
	if (!is_published)
		return drop(skb, ISTHMUS_DROP_NOT_LOCAL_DEST);

	seen.identity = entry->identity;
	seen.cluster_id = entry->cluster_id;
	count_identity(skb, &seen);
	skb->mark = ISTHMUS_MARK_NATIVE;
	return TC_ACT_UNSPEC;
}

/*
 * What makes sure that a packet with an address of the mesh as its source leaves
 * natively only for where that is agreed, whatever became of routes and rules, that
 * nothing at all leaves in clear for what is behind WireGuard, and that nobody on this
 * host sends in another node's name. Packets that are only forwarded are not ours: a
 * host may be its site's router; neither are those of the CNI. A pod of this node that
 * is not published sends nothing into the mesh.
 */
SEC("tc")
int underlay_egress(struct __sk_buff *skb)
{
	const struct isthmus_ipcache_value *entry;
	const struct isthmus_native *here;
	struct isthmus_addr source, destination;
	struct iphdr ip;
	bool is_inside;
	__u32 index = 0;

	here = bpf_map_lookup_elem(&native, &index);
	if (!here || !here->ifindex || skb->protocol != bpf_htons(ETH_P_IP) ||
	    bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET))
		return TC_ACT_UNSPEC;
	source = addr_from_v4(ip.saddr);
	destination = addr_from_v4(ip.daddr);
	if (bpf_map_lookup_elem(&local, &source)) {
		entry = ipcache_lookup(&destination);
		is_inside = entry && entry->flags & ISTHMUS_IPCACHE_INSIDE;
		/* From host to host everything goes by the underlay. */
		if (ip.saddr == here->underlay4 && (!is_inside || entry->flags & ISTHMUS_IPCACHE_NODE))
			return TC_ACT_UNSPEC;
		if (is_left_to_cni(ipcache_lookup(&source), entry))
			return TC_ACT_UNSPEC;
		if (is_inside)
			return drop(skb, ISTHMUS_DROP_NOT_ENCRYPTED);
		if ((entry && entry->flags & ISTHMUS_IPCACHE_NATIVE) || is_of_host(&source))
			return TC_ACT_UNSPEC;
		return drop(skb, ISTHMUS_DROP_WRONG_WAY);
	}
	entry = ipcache_lookup(&source);
	if (is_unpublished(entry))
		return is_left_to_cni(entry, ipcache_lookup(&destination)) ?
			       TC_ACT_UNSPEC : drop(skb, ISTHMUS_DROP_NOT_LOCAL_SOURCE);
	if (skb->ingress_ifindex)
		return TC_ACT_UNSPEC;
	if (entry && !(entry->flags & ISTHMUS_IPCACHE_NODE))
		return drop(skb, ISTHMUS_DROP_NOT_LOCAL_SOURCE);
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "Dual BSD/GPL";
