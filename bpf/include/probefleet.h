/* SPDX-License-Identifier: (LGPL-2.1 OR BSD-2-Clause) */
/*
 * What every Probefleet program in C shares: names that tell the reader what a number means, the pod filter, and the
 * count of what was lost. The catalog uses it, and so can your own program (`program: {c: {source: ...}}`):
 *
 *	#include <probefleet.h>
 *
 *	struct who {
 *		cgroup_id_t cgroup;		// whose event: the agent finds pod and container by it
 *		user_id_t user;			// printed as a user's name
 *	};
 *
 *	struct {
 *		__uint(type, BPF_MAP_TYPE_HASH);
 *		__uint(max_entries, 1024);
 *		__type(key, struct who);
 *		__type(value, u64);
 *	} execs SEC(".maps");
 *
 *	SEC("tp_btf/sched_process_exec")
 *	int on_exec(void *ctx)
 *	{
 *		struct who key = {};
 *
 *		key.cgroup = bpf_get_current_cgroup_id();
 *		if (!probefleet_selected(key.cgroup))
 *			return 0;
 *		key.user = bpf_get_current_uid_gid();
 *		probefleet_add(&execs, &key, 1);
 *		return 0;
 *	}
 *
 *	char LICENSE[] SEC("license") = "GPL";
 */
#ifndef __PROBEFLEET_H
#define __PROBEFLEET_H

#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

/*
 * Meaning by name. BTF keeps the names of typedefs, so these decide how a field of a map's key or of a record is shown.
 * Whatever has another type is shown as the number that it is.
 */
typedef u64 cgroup_id_t;  /* cgroup v2 id: namespace, pod and container. One such field says whose event it is */
typedef u32 pid_nr_t;	  /* process (tgid): command */
typedef u32 tid_nr_t;	  /* thread */
typedef u32 user_id_t;	  /* uid: user name */
typedef u64 function_t;	  /* address in the kernel's code, such as bpf_get_func_ip()'s: the function's name */
typedef u32 syscall_t;	  /* number: name; PROBEFLEET_COMPAT is set for calls by 32-bit programs */
typedef s32 errno_t;	  /* positive or negative errno: name; 0 is shown as success */
typedef u32 open_flags_t;  /* of open(2): O_WRONLY|O_CREAT */
typedef u32 device_t;	  /* dev_t of the kernel (major << 20 | minor): name */
typedef u16 port_t;	  /* in host byte order */
typedef __be16 be_port_t; /* in network byte order */
typedef __be32 ipv4_t;
typedef u8 ipv6_t[16];
typedef u8 ip_t[16];	   /* IPv6, or IPv4 mapped into it (::ffff:a.b.c.d) */
typedef u64 endpoint_t;	   /* of probefleet_endpoints.h: the pod that has an address */
typedef u64 nanoseconds_t; /* a length of time */
typedef u64 ktime_t_ns;	   /* a moment, bpf_ktime_get_ns(): wall clock */
typedef s32 stack_id_t;	   /* of bpf_get_stackid(); the two below say whose symbols to look up */
typedef s32 kernel_stack_id_t;
typedef s32 user_stack_id_t;
typedef char comm_t[16];

#define PROBEFLEET_COMPAT (1U << 31)

/* What programs on packets and sockets name, and BTF does not keep: macros of the kernel's user-space headers. */
#ifndef AF_INET
#define AF_INET 2
#define AF_INET6 10
#endif
#ifndef ETH_P_IP
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#endif
#ifndef TC_ACT_OK
#define TC_ACT_UNSPEC (-1)
#define TC_ACT_OK 0
#define TC_ACT_SHOT 2
#endif

/* -- What was lost ------------------------------------------------------------------------------------------------ */

enum probefleet_count {
	PROBEFLEET_LOST_UPDATE = 0, /* a map was full or busy: something is missing from its numbers */
	PROBEFLEET_LOST_RING = 1,   /* the ring buffer was full: a record is missing */
	PROBEFLEET_SUBMITTED = 2,   /* records that did reach the ring buffer */
	PROBEFLEET_LOST_OTHER = 3,  /* anything else; probe.yaml says what */
	PROBEFLEET_COUNTS = 4,
};

/* Read and summed by the agent: "lost" in the report, zero included. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PROBEFLEET_COUNTS);
	__type(key, u32);
	__type(value, u64);
} probefleet_lost SEC(".maps");

/* Count one loss (or one submitted record). Atomic although per CPU: an interrupt's program may come in between. */
static __always_inline void probefleet_count_lost(u32 what)
{
	u64 *count = bpf_map_lookup_elem(&probefleet_lost, &what);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* -- Whose events are wanted -------------------------------------------------------------------------------------- */

/* Set by the loader: 0 means that every policy of this instance wants everything. */
const volatile u8 probefleet_filter_on = 0;

/* cgroup id -> 1 selected, 2 refused. What is not in it is not known yet, and counted. Filled by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, u8);
} probefleet_filter SEC(".maps");

#define PROBEFLEET_REFUSED 2

/*
 * Is this cgroup's event wanted? Ask first, before anything dear. False only for cgroups that are known to be refused:
 * a pod of this very second is counted under its cgroup id, and judged when it is read. So this saves cost; the numbers
 * are exact with it and without it.
 */
static __always_inline bool probefleet_selected(u64 cgroup_id)
{
	u8 *verdict;

	if (!probefleet_filter_on)
		return true;
	verdict = bpf_map_lookup_elem(&probefleet_filter, &cgroup_id);
	return !verdict || *verdict != PROBEFLEET_REFUSED;
}

/* Set by the loader (`probefleet run --pid`): the one process that is wanted, by its tgid; 0: every one. */
const volatile u32 probefleet_tgid = 0;

/*
 * Is this process's event wanted? Ask with the process that your program says the event belongs to: of the current task
 * only where that is whose event it is (in a wake-up it is not). A program that asks nowhere cannot be run with --pid,
 * and one that asks costs nothing without: the verifier removes what a constant of 0 decides. That is why it is a macro:
 * a function's argument would be found out first, by a helper for most.
 */
#define probefleet_selected_process(tgid) (!probefleet_tgid || (tgid) == probefleet_tgid)

/* The current task's process (tgid), as pid_nr_t shows it. */
static __always_inline pid_nr_t probefleet_current_process(void)
{
	return bpf_get_current_pid_tgid() >> 32;
}

/*
 * The current task with its type, so that its fields are plain loads; NULL where the kernel does not give it (helper
 * since 3f6719c7b62f, "bpf: Add bpf_get_current_task_btf() helper", 5.11). Ask once: a helper that is called again costs
 * as much again, which on CPUs that guard returns is most of what a small program takes.
 */
static __always_inline struct task_struct *probefleet_current_task(void)
{
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_get_current_task_btf))
		return bpf_get_current_task_btf();
	return NULL;
}

/* The cgroup of what probefleet_current_task() said. */
static __always_inline cgroup_id_t probefleet_cgroup_of_current(struct task_struct *task)
{
	return task ? task->cgroups->dfl_cgrp->kn->id : bpf_get_current_cgroup_id();
}

/* The cgroup of the current task. */
static __always_inline cgroup_id_t probefleet_current_cgroup(void)
{
	return probefleet_cgroup_of_current(probefleet_current_task());
}

/* The cgroup of another task, from any pointer. */
static __always_inline cgroup_id_t probefleet_task_cgroup(struct task_struct *task)
{
	return BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
}

/* The same, cheaper, for a task that is an argument of a tp_btf program (the woken task, the new child). */
static __always_inline cgroup_id_t probefleet_argument_cgroup(struct task_struct *task)
{
	return task->cgroups->dfl_cgrp->kn->id;
}

struct sock_cgroup_data___val {
	u64 val;
} __attribute__((preserve_access_index));

struct sock___cgroup {
	struct sock_cgroup_data sk_cgrp_data;
} __attribute__((preserve_access_index));

/*
 * The cgroup of a socket: of the task that made it, for an accepted one that of the listener. 0 where there is none; take
 * probefleet_current_cgroup() then, if the hook runs in the task that uses the socket.
 *
 * From 5.16 (8520e224f547, "bpf, cgroups: Fix cgroup v2 fallback on v1/v2 mixed mode") a socket holds its cgroup v2
 * also where net_cls and net_prio are mounted. Before, one word was either a pointer to the cgroup or, once v1's
 * controllers were in use anywhere, their numbers (bit 0 set); bit 1 was a flag.
 */
static __always_inline cgroup_id_t probefleet_socket_cgroup(const struct sock *socket)
{
	struct sock___cgroup *flavour = (void *)socket;
	struct sock_cgroup_data *data;
	struct cgroup *cgroup;
	u64 word = 0;

	if (!bpf_core_field_exists(flavour->sk_cgrp_data))
		return 0;
	data = __builtin_preserve_access_index(&flavour->sk_cgrp_data);
	if (bpf_core_field_exists(((struct sock_cgroup_data___val *)data)->val)) {
		word = BPF_CORE_READ((struct sock_cgroup_data___val *)data, val);
		if (word & 1)
			return 0;
		cgroup = (void *)(word & ~3ULL);
	} else {
		cgroup = BPF_CORE_READ(data, cgroup);
	}
	return cgroup ? BPF_CORE_READ(cgroup, kn, id) : 0;
}

struct thread_info___x86 {
	u32 status;
} __attribute__((preserve_access_index));

struct task_struct___x86 {
	struct thread_info___x86 thread_info;
} __attribute__((preserve_access_index));

/*
 * Is this system call made by a 32-bit program (TS_COMPAT of x86)? Its numbers mean other calls. Of the task that
 * probefleet_current_task() said.
 */
static __always_inline bool probefleet_current_is_compat(struct task_struct *current_task)
{
	struct task_struct___x86 *task = (void *)current_task;

	if (!bpf_core_field_exists(task->thread_info.status))
		return false;
	if (task)
		return task->thread_info.status & 2;
	task = (void *)bpf_get_current_task();
	return BPF_CORE_READ(task, thread_info.status) & 2;
}

/* The same, for who needs nothing else of the task. */
static __always_inline bool probefleet_is_compat(void)
{
	return probefleet_current_is_compat(probefleet_current_task());
}

/* -- Maps that count ---------------------------------------------------------------------------------------------- */

/*
 * The value of `key`, made of zeroes (`zero`, which must be as large as a value) if it was not there. Two CPUs that
 * insert the same key at once end up with one value: the loser's insertion fails, and it finds the winner's.
 * NULL means that the map is full (or busy, in a nested program), and that was counted.
 */
static __always_inline void *probefleet_value(void *map, const void *key, const void *zero)
{
	void *value = bpf_map_lookup_elem(map, key);

	if (value)
		return value;
	bpf_map_update_elem(map, key, zero, BPF_NOEXIST);
	value = bpf_map_lookup_elem(map, key);
	if (!value)
		probefleet_count_lost(PROBEFLEET_LOST_UPDATE);
	return value;
}

/* Add to the u64 that `key` has in a hash (also a per-CPU one). False if it was lost, which was counted. */
static __always_inline bool probefleet_add(void *map, const void *key, u64 amount)
{
	u64 zero = 0, *value = probefleet_value(map, key, &zero);

	if (!value)
		return false;
	__sync_fetch_and_add(value, amount);
	return true;
}

/* -- Histograms --------------------------------------------------------------------------------------------------- */

/* floor(log2(value)), 0 for 0: the slot of a LOG2 histogram, where slot i holds [2^i, 2^(i+1)) and slot 0 also 0. */
static __always_inline u32 probefleet_log2(u64 value)
{
	u32 slot = 0;

	if (value >> 32) {
		value >>= 32;
		slot = 32;
	}
	if (value >> 16) {
		value >>= 16;
		slot += 16;
	}
	if (value >> 8) {
		value >>= 8;
		slot += 8;
	}
	if (value >> 4) {
		value >>= 4;
		slot += 4;
	}
	if (value >> 2) {
		value >>= 2;
		slot += 2;
	}
	return slot + (value >> 1);
}

/* Count one value in its slot; the last slot is open to the right. */
static __always_inline void probefleet_observe(u64 *slots, u32 count, u64 value)
{
	u32 slot = probefleet_log2(value);

	if (slot >= count)
		slot = count - 1;
	__sync_fetch_and_add(&slots[slot], 1);
}

/* -- Records ------------------------------------------------------------------------------------------------------ */

/* Room for one record in a ring buffer, or NULL, which was counted. Give the map `__type(value, struct ...)`. */
static __always_inline void *probefleet_reserve(void *ring, u64 size)
{
	void *record = bpf_ringbuf_reserve(ring, size, 0);

	if (!record)
		probefleet_count_lost(PROBEFLEET_LOST_RING);
	return record;
}

static __always_inline void probefleet_submit(void *record)
{
	bpf_ringbuf_submit(record, 0);
	probefleet_count_lost(PROBEFLEET_SUBMITTED);
}

/* -- Addresses ---------------------------------------------------------------------------------------------------- */

/* IPv4 as ::ffff:a.b.c.d */
static __always_inline void probefleet_map_ipv4(ip_t to, __be32 address)
{
	__builtin_memset(to, 0, 10);
	to[10] = 0xff;
	to[11] = 0xff;
	__builtin_memcpy(to + 12, &address, 4);
}

#endif /* __PROBEFLEET_H */
