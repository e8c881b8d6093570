// SPDX-License-Identifier: GPL-2.0
/*
 * filetop: which files are read and written, by whom, and how much.
 *
 * The file is found when the call enters, by its descriptor; the bytes are what the call says when it returns.
 */
#include "probefleet_files.h"

#define DIRECTORY_BYTES 32
#define FILE_BYTES 64

const volatile bool processes = false;

/* Of a name without its path: the folder's tells two of them apart for people, device and inode for sure. */
struct opened {
	cgroup_id_t cgroup;
	u64 inode;
	device_t device;
	pid_nr_t process; /* 0 unless asked for */
	char directory[DIRECTORY_BYTES];
	char file[FILE_BYTES];
};

struct transfer {
	u64 reads;
	u64 read_bytes;
	u64 writes;
	u64 written_bytes;
};

struct flight {
	struct opened opened;
	bool writes;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct opened);
	__type(value, struct transfer);
} transfers SEC(".maps");

/* By task_struct: a thread is in one call at a time. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct flight);
} in_flight SEC(".maps");

static const struct transfer no_transfer;

SEC("tp_btf/sys_enter")
int BPF_PROG(sys_enter, struct pt_regs *regs, long number)
{
	bool reads = probefleet_is_read(number);
	struct dentry *entry, *parent;
	struct flight flight;
	struct inode *inode;
	struct file *file;
	cgroup_id_t cgroup;
	u64 task;

	if ((!reads && !probefleet_is_write(number)) || probefleet_is_compat() ||
	    !probefleet_selected_process(probefleet_current_process()))
		return 0;
	cgroup = probefleet_current_cgroup();
	if (!probefleet_selected(cgroup))
		return 0;
	file = probefleet_file(regs, number);
	inode = BPF_CORE_READ(file, f_inode);
	if ((BPF_CORE_READ(inode, i_mode) & PROBEFLEET_FILE_TYPE) != PROBEFLEET_REGULAR)
		return 0;

	__builtin_memset(&flight, 0, sizeof(flight));
	flight.writes = !reads;
	flight.opened.cgroup = cgroup;
	flight.opened.inode = BPF_CORE_READ(inode, i_ino);
	flight.opened.device = BPF_CORE_READ(inode, i_sb, s_dev);
	if (processes)
		flight.opened.process = probefleet_current_process();
	entry = BPF_CORE_READ(file, f_path.dentry);
	parent = BPF_CORE_READ(entry, d_parent);
	bpf_probe_read_kernel_str(flight.opened.file, sizeof(flight.opened.file), BPF_CORE_READ(entry, d_name.name));
	/* The root of a file system is its own parent, and called "/". */
	bpf_probe_read_kernel_str(flight.opened.directory, sizeof(flight.opened.directory),
				  BPF_CORE_READ(parent, d_name.name));
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
	struct transfer *transfer;

	if (!found)
		return 0;
	flight = *found;
	bpf_map_delete_elem(&in_flight, &task);
	if (result < 0)
		return 0;
	transfer = probefleet_value(&transfers, &flight.opened, &no_transfer);
	if (!transfer)
		return 0;
	if (flight.writes) {
		__sync_fetch_and_add(&transfer->writes, 1);
		__sync_fetch_and_add(&transfer->written_bytes, result);
	} else {
		__sync_fetch_and_add(&transfer->reads, 1);
		__sync_fetch_and_add(&transfer->read_bytes, result);
	}
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
