/* SPDX-License-Identifier: (LGPL-2.1 OR BSD-2-Clause) */
/*
 * Whose address is that? A map that the agent keeps, one for all programs of a node: the address of every pod of the
 * cluster (but of those in their node's network, which have the node's) to a number that stands for the pod.
 *
 *	#include <probefleet_endpoints.h>
 *
 *	struct side {
 *		endpoint_t other;		// printed as namespace/name
 *	};
 *	...
 *	key.other = probefleet_endpoint4(sk->__sk_common.skc_daddr);
 *
 * Where no operator has told the node whose addresses are whose, as on a machine without Kubernetes, it is empty.
 */
#ifndef __PROBEFLEET_ENDPOINTS_H
#define __PROBEFLEET_ENDPOINTS_H

#include "probefleet.h"

/* The agent puts its own in this one's place; entries take memory as they come. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, ip_t);
	__type(value, endpoint_t);
} probefleet_endpoints SEC(".maps");

/* The pod that has this address (16 bytes, as ip_t); 0: none that is known. */
static __always_inline endpoint_t probefleet_endpoint(const u8 *address)
{
	endpoint_t *found = bpf_map_lookup_elem(&probefleet_endpoints, address);

	return found ? *found : 0;
}

/* The same for an IPv4 address, in network byte order. */
static __always_inline endpoint_t probefleet_endpoint4(ipv4_t address)
{
	ip_t mapped = { [10] = 0xff, [11] = 0xff };

	__builtin_memcpy(mapped + 12, &address, sizeof(address));
	return probefleet_endpoint(mapped);
}

#endif
