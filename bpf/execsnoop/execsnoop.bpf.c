// SPDX-License-Identifier: GPL-2.0
/*
 * execsnoop: every program that is started, with its arguments.
 *
 * The hook is behind the point of no return of execve: what failed is not seen. It runs in the new program, so user,
 * cgroup and memory are already the new ones.
 */
#include "probefleet.h"

#define FILE_BYTES 128
#define ARGUMENT_BYTES 256

struct user_key {
	cgroup_id_t cgroup;
	user_id_t user;
};

struct event {
	ktime_t_ns time;
	cgroup_id_t cgroup;
	pid_nr_t pid;
	pid_nr_t parent;
	user_id_t user;
	u32 argument_bytes; /* as long as they were; what is beyond ARGUMENT_BYTES is cut off */
	comm_t command;
	char file[FILE_BYTES];
	char arguments[ARGUMENT_BYTES]; /* separated by spaces */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct user_key);
	__type(value, u64);
} execs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
	__type(value, struct event);
} events SEC(".maps");

static __always_inline void read_arguments(struct event *event, struct task_struct *task)
{
	u64 start = BPF_CORE_READ(task, mm, arg_start), end = BPF_CORE_READ(task, mm, arg_end);
	u32 length, i;

	event->argument_bytes = end - start;
	length = event->argument_bytes < ARGUMENT_BYTES ? event->argument_bytes : ARGUMENT_BYTES;
	__builtin_memset(event->arguments, 0, sizeof(event->arguments));
	if (bpf_probe_read_user(event->arguments, length, (void *)start))
		return;
	/*
	 * Arguments end in NULs: these become spaces, but for the last one; a list that was cut off ends here.
	 * Without branches: the verifier would follow both ways of each of 256 bytes.
	 */
	for (i = 0; i < ARGUMENT_BYTES - 1; i++) {
		u32 character = (u8)event->arguments[i];
		u32 is_nul = (character - 1) >> 31, is_inside = (i + 1 - length) >> 31;

		event->arguments[i] = character + is_nul * is_inside * ' ';
	}
	event->arguments[ARGUMENT_BYTES - 1] = 0;
}

static __always_inline int on_exec(struct task_struct *task, struct linux_binprm *binary)
{
	cgroup_id_t cgroup = probefleet_current_cgroup();
	struct event *event;
	struct user_key key;

	if (!probefleet_selected_process(probefleet_current_process()) || !probefleet_selected(cgroup))
		return 0;
	__builtin_memset(&key, 0, sizeof(key));
	key.cgroup = cgroup;
	key.user = bpf_get_current_uid_gid();
	probefleet_add(&execs, &key, 1);

	event = probefleet_reserve(&events, sizeof(*event));
	if (!event)
		return 0;
	event->time = bpf_ktime_get_ns();
	event->cgroup = cgroup;
	event->pid = bpf_get_current_pid_tgid() >> 32;
	event->parent = BPF_CORE_READ(task, real_parent, tgid);
	event->user = key.user;
	bpf_get_current_comm(event->command, sizeof(event->command));
	__builtin_memset(event->file, 0, sizeof(event->file));
	bpf_probe_read_kernel_str(event->file, sizeof(event->file), BPF_CORE_READ(binary, filename));
	read_arguments(event, task);
	probefleet_submit(event);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(exec_btf, struct task_struct *task, pid_t old_pid, struct linux_binprm *binary)
{
	return on_exec(task, binary);
}

SEC("raw_tp/sched_process_exec")
int BPF_PROG(exec_raw, struct task_struct *task, pid_t old_pid, struct linux_binprm *binary)
{
	return on_exec(task, binary);
}

char LICENSE[] SEC("license") = "GPL";
