// SPDX-License-Identifier: GPL-2.0
/*
 * runqlat: how long tasks that could run waited for a CPU.
 *
 * A wait begins when a task is woken, born or preempted, and ends when it is switched in. It belongs to the task that
 * waited: who wakes it, and who ran before it, are bystanders.
 */
#include "probefleet.h"

#define SLOTS 40
#define TASK_DEAD 0x80

const volatile bool processes = false;

struct waiter {
	cgroup_id_t cgroup;
	pid_nr_t process; /* 0 unless asked for */
};

struct duration {
	u64 slots[SLOTS];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct waiter);
	__type(value, struct duration);
} durations SEC(".maps");

/* Since when a task waits, by task_struct; 0: it does not. Written over, and removed when the task is dead. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, u64);
	__type(value, u64);
} waiting SEC(".maps");

static const struct duration no_duration;

/* 2f064a59a11f, "sched: Change task_struct::state", 5.14 */
struct task_struct___before_5_14 {
	volatile long state;
} __attribute__((preserve_access_index));

static __always_inline u64 state_of(struct task_struct *task)
{
	struct task_struct___before_5_14 *old = (void *)task;

	if (bpf_core_field_exists(old->state))
		return old->state;
	return task->__state;
}

static __always_inline int enqueue(struct task_struct *task)
{
	u64 key = (u64)task, zero = 0, *since;

	if (!task->pid || !probefleet_selected_process(task->tgid) ||
	    !probefleet_selected(probefleet_argument_cgroup(task)))
		return 0;
	since = probefleet_value(&waiting, &key, &zero);
	if (since)
		*since = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/sched_wakeup")
int BPF_PROG(wakeup, struct task_struct *task)
{
	return enqueue(task);
}

SEC("tp_btf/sched_wakeup_new")
int BPF_PROG(wakeup_new, struct task_struct *task)
{
	return enqueue(task);
}

/* The arguments' order is that of all releases; what 5.18 added (prev_state) is behind them. */
SEC("tp_btf/sched_switch")
int BPF_PROG(sched_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	u64 state = state_of(prev), key, *since, elapsed;
	struct duration *duration;
	struct waiter waiter;

	/* Preempted on its way to sleep it stays on the queue, whatever its state says. */
	if (preempt || !state) {
		enqueue(prev);
	} else if (state & TASK_DEAD) {
		key = (u64)prev;
		bpf_map_delete_elem(&waiting, &key);
	}

	if (!next->pid || !probefleet_selected_process(next->tgid))
		return 0;
	__builtin_memset(&waiter, 0, sizeof(waiter));
	waiter.cgroup = probefleet_argument_cgroup(next);
	if (!probefleet_selected(waiter.cgroup))
		return 0;
	key = (u64)next;
	since = bpf_map_lookup_elem(&waiting, &key);
	if (!since || !*since)
		return 0;
	elapsed = bpf_ktime_get_ns() - *since;
	*since = 0;
	if (processes)
		waiter.process = next->tgid;
	duration = probefleet_value(&durations, &waiter, &no_duration);
	if (duration)
		probefleet_observe(duration->slots, SLOTS, elapsed);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
