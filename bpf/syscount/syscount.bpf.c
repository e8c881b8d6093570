// SPDX-License-Identifier: GPL-2.0
/*
 * syscount: calls and their latency, by pod and system call.
 *
 * A call is counted when it enters, so one that never returns (exit_group, a successful execve in another thread) is
 * counted as well. Its latency is counted when it returns. Calls that were under way at attach have no latency.
 */
#include "probefleet.h"

/* 2^39 ns is nine minutes; what takes longer is in the last slot. */
#define SLOTS 40
#define BITMAP_BITS 512

/*
 * One bit a system call. All bits are set by default; the loader clears those not asked for. Numbers past the bitmap
 * (x32) and calls by 32-bit programs count only if the last bit is set, which belongs to no system call.
 */
const volatile u64 syscalls[BITMAP_BITS / 64] = {
	~0ULL, ~0ULL, ~0ULL, ~0ULL, ~0ULL, ~0ULL, ~0ULL, ~0ULL,
};
const volatile bool latency = true;

struct call {
	cgroup_id_t cgroup;
	syscall_t syscall;
};

struct duration {
	u64 slots[SLOTS];
};

/* The call that a thread is in. `started` 0: in none that we saw enter. */
struct flight {
	cgroup_id_t cgroup;
	u64 started;
	u32 syscall;
};

/* Per CPU: the same call is made on all CPUs at once, and system calls do not nest. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct call);
	__type(value, u64);
} calls SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct call);
	__type(value, struct duration);
} durations SEC(".maps");

/*
 * By task_struct, not by tid: execve in a thread gives it its leader's tid before it returns. An entry is written over
 * call by call and removed when the thread ends.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct flight);
} in_flight SEC(".maps");

static const struct duration no_duration;

static __always_inline bool is_wanted(u32 syscall)
{
	if (syscall >= BITMAP_BITS)
		syscall = BITMAP_BITS - 1;
	return syscalls[syscall / 64] >> (syscall % 64) & 1;
}

static __always_inline int enter(s64 number)
{
	struct task_struct *current_task;
	struct flight *flight, now = {};
	struct call call;
	u64 task;

	/* -1: a tracer or seccomp took the call away */
	if (number < 0)
		return 0;
	__builtin_memset(&call, 0, sizeof(call));
	call.syscall = number;
	current_task = probefleet_current_task();
	if (probefleet_current_is_compat(current_task))
		call.syscall |= PROBEFLEET_COMPAT;
	if (!is_wanted(call.syscall) || !probefleet_selected_process(probefleet_current_process()))
		return 0;
	call.cgroup = probefleet_cgroup_of_current(current_task);
	if (!probefleet_selected(call.cgroup))
		return 0;
	if (!probefleet_add(&calls, &call, 1))
		return 0;
	if (!latency)
		return 0;

	task = current_task ? (u64)current_task : bpf_get_current_task();
	flight = probefleet_value(&in_flight, &task, &now);
	if (!flight)
		return 0;
	flight->cgroup = call.cgroup;
	flight->syscall = call.syscall;
	flight->started = bpf_ktime_get_ns();
	return 0;
}

static __always_inline int leave(void)
{
	struct duration *duration;
	struct flight *flight;
	struct call call;
	u64 task, elapsed;

	if (!latency)
		return 0;
	task = bpf_get_current_task();
	flight = bpf_map_lookup_elem(&in_flight, &task);
	if (!flight || !flight->started)
		return 0;
	elapsed = bpf_ktime_get_ns() - flight->started;
	flight->started = 0;

	/* As at enter: the return value's registers may name another call (rt_sigreturn), the thread another cgroup. */
	__builtin_memset(&call, 0, sizeof(call));
	call.cgroup = flight->cgroup;
	call.syscall = flight->syscall;
	duration = probefleet_value(&durations, &call, &no_duration);
	if (duration)
		probefleet_observe(duration->slots, SLOTS, elapsed);
	return 0;
}

SEC("tp_btf/sys_enter")
int BPF_PROG(sys_enter_btf, struct pt_regs *regs, long number)
{
	return enter(number);
}

SEC("tp_btf/sys_exit")
int BPF_PROG(sys_exit_btf, struct pt_regs *regs, long result)
{
	return leave();
}

SEC("raw_tp/sys_enter")
int BPF_PROG(sys_enter_raw, struct pt_regs *regs, long number)
{
	return enter(number);
}

SEC("raw_tp/sys_exit")
int BPF_PROG(sys_exit_raw, struct pt_regs *regs, long result)
{
	return leave();
}

static __always_inline int thread_exit(struct task_struct *task)
{
	u64 key = (u64)task;

	bpf_map_delete_elem(&in_flight, &key);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(thread_exit_btf, struct task_struct *task)
{
	return thread_exit(task);
}

SEC("raw_tp/sched_process_exit")
int BPF_PROG(thread_exit_raw, struct task_struct *task)
{
	return thread_exit(task);
}

char LICENSE[] SEC("license") = "GPL";
