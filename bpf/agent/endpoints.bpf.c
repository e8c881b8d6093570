// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The map of bpf/include/probefleet_endpoints.h by itself, as every ProbeMap is: an object of one map, from which a node
 * makes the one that its programs share.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

typedef u8 ip_t[16];
typedef u64 endpoint_t;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, ip_t);
	__type(value, endpoint_t);
} shared SEC(".maps");
