// SPDX-License-Identifier: GPL-2.0
/*
 * profile: where CPU time goes: on every CPU, so many times a second, what runs and how it got there.
 */
#include "probefleet.h"

#define MAX_DEPTH 127
#define EEXIST 17

struct cpu_sample {
	cgroup_id_t cgroup;
	pid_nr_t pid;
	kernel_stack_id_t kernel_stack; /* negative errno: none (in user mode), or lost */
	user_stack_id_t user_stack;	/* negative errno: none (a kernel thread), or lost */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct cpu_sample);
	__type(value, u64);
} samples SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_STACK_TRACE);
	__uint(max_entries, 16384);
	__uint(key_size, sizeof(u32));
	__uint(value_size, MAX_DEPTH * sizeof(u64));
} stacks SEC(".maps");

/* A stack whose place is taken by another is lost: the sample counts, without it. */
static __always_inline s32 stack(void *ctx, u64 flags)
{
	long id = bpf_get_stackid(ctx, &stacks, flags);

	if (id == -EEXIST)
		probefleet_count_lost(PROBEFLEET_LOST_OTHER);
	return id;
}

SEC("perf_event")
int on_sample(struct bpf_perf_event_data *ctx)
{
	struct cpu_sample sample;

	__builtin_memset(&sample, 0, sizeof(sample));
	sample.pid = bpf_get_current_pid_tgid() >> 32;
	if (!sample.pid || !probefleet_selected_process(sample.pid))
		return 0; /* idle, or of no interest */
	sample.cgroup = probefleet_current_cgroup();
	if (!probefleet_selected(sample.cgroup))
		return 0;
	sample.kernel_stack = stack(ctx, 0);
	sample.user_stack = stack(ctx, BPF_F_USER_STACK);
	probefleet_add(&samples, &sample, 1);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
