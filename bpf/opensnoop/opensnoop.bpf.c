// SPDX-License-Identifier: GPL-2.0
/*
 * opensnoop: files that are opened (open, openat, openat2, creat), with what came of it.
 *
 * Recorded when the call returns: only then is it known whether it failed, and only then is the name surely in memory.
 * Calls by 32-bit programs are not seen.
 */
#include "probefleet.h"

#define FILE_BYTES 256

const volatile bool failed = false;

struct result_key {
	cgroup_id_t cgroup;
	errno_t result; /* 0 or a negative errno */
};

struct event {
	ktime_t_ns time;
	cgroup_id_t cgroup;
	pid_nr_t pid;
	tid_nr_t thread;
	user_id_t user;
	errno_t result; /* the descriptor, or a negative errno */
	open_flags_t flags;
	comm_t command;
	char file[FILE_BYTES]; /* as the program wrote it; longer names are cut off */
};

struct flight {
	cgroup_id_t cgroup;
	u64 file; /* an address in the program */
	u32 flags;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct result_key);
	__type(value, u64);
} opens SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
	__type(value, struct event);
} events SEC(".maps");

/* By task_struct: a thread is in one call at a time. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct flight);
} in_flight SEC(".maps");

/* The ABI's numbers, which never change. arm64 has no open and no creat. */
#if defined(__TARGET_ARCH_x86)
#define NR_OPEN 2
#define NR_CREAT 85
#define NR_OPENAT 257
#else
#define NR_OPEN -1
#define NR_CREAT -1
#define NR_OPENAT 56
#endif
#define NR_OPENAT2 437
#define CREAT_FLAGS 01101 /* O_CREAT | O_WRONLY | O_TRUNC */

static __always_inline bool is_open(long number)
{
	return number == NR_OPENAT || number == NR_OPENAT2 ||
	       (NR_OPEN >= 0 && (number == NR_OPEN || number == NR_CREAT));
}

SEC("tp_btf/sys_enter")
int BPF_PROG(sys_enter, struct pt_regs *regs, long number)
{
	struct flight flight = {};
	u64 task;

	if (!is_open(number) || probefleet_is_compat() || !probefleet_selected_process(probefleet_current_process()))
		return 0;
	flight.cgroup = probefleet_current_cgroup();
	if (!probefleet_selected(flight.cgroup))
		return 0;
	if (number == NR_OPENAT) {
		flight.file = PT_REGS_PARM2_CORE_SYSCALL(regs);
		flight.flags = PT_REGS_PARM3_CORE_SYSCALL(regs);
	} else if (number == NR_OPENAT2) {
		struct open_how *how = (void *)PT_REGS_PARM3_CORE_SYSCALL(regs);
		u64 flags = 0;

		flight.file = PT_REGS_PARM2_CORE_SYSCALL(regs);
		bpf_probe_read_user(&flags, sizeof(flags), how); /* its first member; ABI */
		flight.flags = flags;
	} else {
		flight.file = PT_REGS_PARM1_CORE_SYSCALL(regs);
		flight.flags = number == NR_CREAT ? CREAT_FLAGS : PT_REGS_PARM2_CORE_SYSCALL(regs);
	}
	task = bpf_get_current_task();
	if (bpf_map_update_elem(&in_flight, &task, &flight, BPF_ANY))
		probefleet_count_lost(PROBEFLEET_LOST_UPDATE);
	return 0;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(sys_exit, struct pt_regs *regs, long result)
{
	u64 task = bpf_get_current_task();
	struct flight *found = bpf_map_lookup_elem(&in_flight, &task), flight;
	struct result_key key;
	struct event *event;
	u64 id;

	if (!found)
		return 0;
	flight = *found;
	bpf_map_delete_elem(&in_flight, &task);

	__builtin_memset(&key, 0, sizeof(key));
	key.cgroup = flight.cgroup;
	key.result = result < 0 ? result : 0;
	probefleet_add(&opens, &key, 1);
	if (failed && result >= 0)
		return 0;

	event = probefleet_reserve(&events, sizeof(*event));
	if (!event)
		return 0;
	id = bpf_get_current_pid_tgid();
	event->time = bpf_ktime_get_ns();
	event->cgroup = flight.cgroup;
	event->pid = id >> 32;
	event->thread = id;
	event->user = bpf_get_current_uid_gid();
	event->result = result;
	event->flags = flight.flags;
	bpf_get_current_comm(event->command, sizeof(event->command));
	__builtin_memset(event->file, 0, sizeof(event->file));
	bpf_probe_read_user_str(event->file, sizeof(event->file), (void *)flight.file);
	probefleet_submit(event);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(thread_exit, struct task_struct *task)
{
	u64 key = (u64)task;

	bpf_map_delete_elem(&in_flight, &key);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
