// SPDX-License-Identifier: GPL-2.0
/*
 * offcputime: where threads sleep, and how long: by the stack that left the CPU.
 *
 * Both ends are in sched_switch. The stacks are taken when the thread leaves, while it still is the current one; the
 * time is known when it runs again, and belongs to it, whoever woke it and whatever ran in between.
 */
#include "probefleet.h"

#define MAX_DEPTH 127
#define EEXIST 17
#define TASK_DEAD 0x80

const volatile u64 minimum = 0;
const volatile bool preempted = false;

struct sleeper {
	cgroup_id_t cgroup;
	pid_nr_t pid;
	kernel_stack_id_t kernel_stack; /* negative errno: lost */
	user_stack_id_t user_stack;	/* negative errno: none (a kernel thread), or lost */
};

struct sleep {
	u64 nanoseconds;
	u64 times;
};

struct leaving {
	u64 since;
	struct sleeper sleeper;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sleeper);
	__type(value, struct sleep);
} sleeps SEC(".maps");

/* By task_struct; removed when the thread runs again, or is dead. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, u64);
	__type(value, struct leaving);
} away SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_STACK_TRACE);
	__uint(max_entries, 16384);
	__uint(key_size, sizeof(u32));
	__uint(value_size, MAX_DEPTH * sizeof(u64));
} stacks SEC(".maps");

static const struct sleep no_sleep;

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

/* A stack whose place is taken by another is lost: the time counts, without it. */
static __always_inline s32 stack(void *ctx, u64 flags)
{
	long id = bpf_get_stackid(ctx, &stacks, flags);

	if (id == -EEXIST)
		probefleet_count_lost(PROBEFLEET_LOST_OTHER);
	return id;
}

static __always_inline void leave(void *ctx, struct task_struct *task, u64 now)
{
	struct leaving leaving;
	u64 key = (u64)task;

	__builtin_memset(&leaving, 0, sizeof(leaving));
	leaving.sleeper.cgroup = probefleet_argument_cgroup(task);
	if (!probefleet_selected(leaving.sleeper.cgroup))
		return;
	leaving.sleeper.pid = task->tgid;
	leaving.sleeper.kernel_stack = stack(ctx, 0);
	leaving.sleeper.user_stack = stack(ctx, BPF_F_USER_STACK);
	leaving.since = now;
	if (bpf_map_update_elem(&away, &key, &leaving, BPF_ANY))
		probefleet_count_lost(PROBEFLEET_LOST_UPDATE);
}

static __always_inline void come_back(struct task_struct *task, u64 now)
{
	u64 key = (u64)task, elapsed;
	struct leaving *found, leaving;
	struct sleep *sleep;

	found = bpf_map_lookup_elem(&away, &key);
	if (!found)
		return;
	leaving = *found;
	bpf_map_delete_elem(&away, &key);
	elapsed = now - leaving.since;
	if (elapsed < minimum)
		return;
	sleep = probefleet_value(&sleeps, &leaving.sleeper, &no_sleep);
	if (!sleep)
		return;
	__sync_fetch_and_add(&sleep->nanoseconds, elapsed);
	__sync_fetch_and_add(&sleep->times, 1);
}

/* The arguments' order is that of all releases; what 5.18 added (prev_state) is behind them. */
SEC("tp_btf/sched_switch")
int BPF_PROG(sched_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	/* One moment for both: what taking the stack of one costs is not added to the other's time off the CPU. */
	u64 state = state_of(prev), key, now = bpf_ktime_get_ns();

	if (state & TASK_DEAD) {
		key = (u64)prev;
		bpf_map_delete_elem(&away, &key);
	} else if (prev->pid && probefleet_selected_process(prev->tgid) && (preempted || (!preempt && state))) {
		/* Preempted on its way to sleep it stays on the queue, whatever its state says. */
		leave(ctx, prev, now);
	}
	if (next->pid)
		come_back(next, now);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
