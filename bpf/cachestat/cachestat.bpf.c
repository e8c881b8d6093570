// SPDX-License-Identifier: GPL-2.0
/*
 * cachestat: how often what is read from files is in the page cache already.
 *
 * A read that returns so many bytes wanted so many pages. Those of them that were added to the cache by the same thread
 * while the call ran are misses, the others hits; also what read-ahead has brought before.
 */
#include "probefleet_files.h"

#define PAGE_SHIFT 12
#define OVERLAY 0x794c7630 /* OVERLAYFS_SUPER_MAGIC */
#define WITHOUT_END (~0ULL)

const volatile bool processes = false;

struct reader {
	cgroup_id_t cgroup;
	pid_nr_t process; /* 0 unless asked for */
};

struct cached {
	u64 hits;
	u64 misses;
	u64 added;
};

/* The read that a thread is in. Inode 0: any, which is what a file of an overlay file system lies in. */
struct flight {
	cgroup_id_t cgroup;
	u64 position;
	u64 first;
	u64 last;
	u64 inode;
	u64 missed;
	u32 device;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct reader);
	__type(value, struct cached);
} pages SEC(".maps");

/* By task_struct: a thread is in one call at a time. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct flight);
} in_flight SEC(".maps");

static const struct cached nothing_cached;

/* Until an entry of the page cache could be several pages, it had no order. */
struct trace_event_raw_mm_filemap_op_page_cache___order {
	unsigned char order;
} __attribute__((preserve_access_index));

static __always_inline struct cached *of(cgroup_id_t cgroup)
{
	struct reader key;

	__builtin_memset(&key, 0, sizeof(key));
	key.cgroup = cgroup;
	if (processes)
		key.process = probefleet_current_process();
	return probefleet_value(&pages, &key, &nothing_cached);
}

/* Reads of the file go through the page cache to something behind it: not those of tmpfs or /proc, nor O_DIRECT. */
static __always_inline bool is_cached(struct file *file, struct inode *inode, bool *overlay)
{
	u32 type = BPF_CORE_READ(inode, i_mode) & PROBEFLEET_FILE_TYPE;
	struct super_block *super = BPF_CORE_READ(inode, i_sb);

	if (BPF_CORE_READ(file, f_flags) & PROBEFLEET_O_DIRECT)
		return false;
	if (type == PROBEFLEET_BLOCK)
		return true;
	*overlay = BPF_CORE_READ(super, s_magic) == OVERLAY;
	return type == PROBEFLEET_REGULAR && (*overlay || BPF_CORE_READ(super, s_bdi, dev));
}

SEC("tp_btf/sys_enter")
int BPF_PROG(sys_enter, struct pt_regs *regs, long number)
{
	u64 task = bpf_get_current_task(), length = WITHOUT_END;
	struct flight flight;
	bool overlay = false;
	struct inode *inode;
	struct file *file;

	if (!probefleet_is_read(number) || probefleet_is_compat() ||
	    !probefleet_selected_process(probefleet_current_process()))
		return 0;
	__builtin_memset(&flight, 0, sizeof(flight));
	flight.cgroup = probefleet_current_cgroup();
	if (!probefleet_selected(flight.cgroup))
		return 0;
	file = probefleet_file(regs, number);
	inode = BPF_CORE_READ(file, f_inode);
	if (!file || !is_cached(file, inode, &overlay))
		return 0;
	if (!overlay) {
		/* Of a block device the inode that is opened is not the one that has its pages. */
		inode = BPF_CORE_READ(file, f_mapping, host);
		flight.inode = BPF_CORE_READ(inode, i_ino);
		flight.device = BPF_CORE_READ(inode, i_sb, s_dev);
	}
	flight.position = probefleet_file_position(regs, number, file);
	if (number == PROBEFLEET_READ || number == PROBEFLEET_PREAD)
		length = PT_REGS_PARM3_CORE_SYSCALL(regs);
	else if (number == PROBEFLEET_SENDFILE)
		length = PT_REGS_PARM4_CORE_SYSCALL(regs);
	flight.first = flight.position >> PAGE_SHIFT;
	flight.last = WITHOUT_END;
	if (length && length < WITHOUT_END - flight.position)
		flight.last = (flight.position + length - 1) >> PAGE_SHIFT;
	if (bpf_map_update_elem(&in_flight, &task, &flight, BPF_ANY))
		probefleet_count_lost(PROBEFLEET_LOST_UPDATE);
	return 0;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(sys_exit, struct pt_regs *regs, long result)
{
	u64 task = bpf_get_current_task(), wanted, missed;
	struct flight *found = bpf_map_lookup_elem(&in_flight, &task), flight;
	struct cached *cached;

	if (!found)
		return 0;
	flight = *found;
	bpf_map_delete_elem(&in_flight, &task);
	if (result <= 0)
		return 0;
	wanted = ((flight.position + result - 1) >> PAGE_SHIFT) - flight.first + 1;
	missed = flight.missed < wanted ? flight.missed : wanted;
	cached = of(flight.cgroup);
	if (!cached)
		return 0;
	__sync_fetch_and_add(&cached->hits, wanted - missed);
	__sync_fetch_and_add(&cached->misses, missed);
	return 0;
}

/* In the task that wants the page, or in one that the kernel has for it. */
SEC("tracepoint/filemap/mm_filemap_add_to_page_cache")
int page_added(struct trace_event_raw_mm_filemap_op_page_cache *entry)
{
	struct trace_event_raw_mm_filemap_op_page_cache___order *newer = (void *)entry;
	u64 task = bpf_get_current_task(), first = entry->index, last = first;
	cgroup_id_t cgroup = probefleet_current_cgroup();
	struct cached *cached;
	struct flight *flight;

	if (bpf_core_field_exists(newer->order))
		last = first + (1ULL << (newer->order & 63)) - 1;
	if (!probefleet_selected_process(probefleet_current_process()) || !probefleet_selected(cgroup))
		return 0;
	cached = of(cgroup);
	if (cached)
		__sync_fetch_and_add(&cached->added, last - first + 1);
	flight = bpf_map_lookup_elem(&in_flight, &task);
	if (!flight || (flight->inode && (flight->inode != entry->i_ino || flight->device != entry->s_dev)))
		return 0;
	if (first < flight->first)
		first = flight->first;
	if (last > flight->last)
		last = flight->last;
	if (first <= last)
		flight->missed += last - first + 1;
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
