/* SPDX-License-Identifier: (LGPL-2.1 OR BSD-2-Clause) */
/*
 * The types of bpf/include/probefleet.h for BCC: `#include <probefleet.h>` in a program for BCC brings these, the maps
 * probefleet_filter and probefleet_lost, and the functions probefleet_selected(cgroup), probefleet_selected_process(tgid)
 * and probefleet_count_lost(what). `#include <probefleet_endpoints.h>` after it brings the map probefleet_endpoints, and the
 * functions probefleet_endpoint(address) and probefleet_endpoint4(address).
 */
#pragma once

typedef u64 cgroup_id_t;
typedef u32 pid_nr_t;
typedef u32 tid_nr_t;
typedef u32 user_id_t;
typedef u32 syscall_t;
typedef u64 function_t;
typedef s32 errno_t;
typedef u32 open_flags_t;
typedef u32 device_t;
typedef u16 port_t;
typedef __be16 be_port_t;
typedef __be32 ipv4_t;
typedef u8 ipv6_t[16];
typedef u8 ip_t[16];
typedef u64 endpoint_t;
typedef u64 nanoseconds_t;
typedef u64 ktime_t_ns;
typedef s32 stack_id_t;
typedef s32 kernel_stack_id_t;
typedef s32 user_stack_id_t;
typedef char comm_t[16];

/* `probefleet run --pid` sets it anew; 0: every process. */
#define PROBEFLEET_TGID 0

/* The key of probefleet_endpoints. */
struct probefleet_address {
	ip_t bytes;
};

#define PROBEFLEET_COMPAT (1U << 31)
#define PROBEFLEET_REFUSED 2
#define PROBEFLEET_LOST_UPDATE 0
#define PROBEFLEET_LOST_RING 1
#define PROBEFLEET_SUBMITTED 2
#define PROBEFLEET_LOST_OTHER 3
#define PROBEFLEET_COUNTS 4
