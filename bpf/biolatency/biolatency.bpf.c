// SPDX-License-Identifier: GPL-2.0
/*
 * biolatency: how long block devices take for a request.
 *
 * A request completes in an interrupt, so it belongs to the cgroup of the task that put it into the queue, or, where it
 * passed none, gave it to the device. For what was written to files that is often the kernel's flusher.
 */
#include "probefleet.h"

#define SLOTS 40
#define OPERATION_MASK 0xff

const volatile bool queued = false;

/* REQ_OP_* of include/linux/blk_types.h; all drivers' tools rely on them. Others are shown as numbers. */
enum operation {
	read = 0,
	write = 1,
	flush = 2,
	discard = 3,
	secure_erase = 5,
	write_zeroes = 9,
};

struct device_operation {
	cgroup_id_t cgroup;
	device_t device;
	enum operation operation;
};

struct duration {
	u64 slots[SLOTS];
};

struct flight {
	cgroup_id_t cgroup;
	u64 inserted;
	u64 issued;
	u32 process;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct device_operation);
	__type(value, struct duration);
} durations SEC(".maps");

/* By struct request. Requests are allocated with their queues and used again: there are only so many. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, u64);
	__type(value, struct flight);
} in_flight SEC(".maps");

static const struct duration no_duration;

/* f3fa33acca9f, "block: remove the ->rq_disk field in struct request", 5.17 */
struct request___before_5_17 {
	struct gendisk *rq_disk;
} __attribute__((preserve_access_index));

/*
 * a54895fa057c, "block: remove the request_queue to argument request based tracepoints", 5.11 and some of 5.10: the
 * request is the first argument, or the second behind its queue. The version does not tell. A request does: the
 * hardware queue that it names belongs to the queue that it names.
 *
 * The second argument is read as memory: a program that reads args[1] is not attached where there is but one.
 */
static __always_inline struct request *request_of(struct bpf_raw_tracepoint_args *ctx)
{
	struct request *request = (void *)ctx->args[0];
	struct request_queue *queue = BPF_CORE_READ(request, q);
	u64 second = 0;

	if (queue && BPF_CORE_READ(request, mq_hctx, queue) == queue)
		return request;
	bpf_probe_read_kernel(&second, sizeof(second), (void *)ctx + sizeof(u64));
	return (void *)second;
}

static __always_inline int enter(struct request *request, bool issue)
{
	u64 key = (u64)request, now = bpf_ktime_get_ns();
	struct flight *found = bpf_map_lookup_elem(&in_flight, &key), flight = {};

	if (found && issue) {
		found->issued = now;
		return 0;
	}
	flight.cgroup = probefleet_current_cgroup();
	flight.process = probefleet_current_process();
	flight.inserted = now;
	flight.issued = issue ? now : 0;
	if (bpf_map_update_elem(&in_flight, &key, &flight, BPF_ANY))
		probefleet_count_lost(PROBEFLEET_LOST_UPDATE);
	return 0;
}

static __always_inline device_t device_of(struct request *request)
{
	struct request___before_5_17 *old = (void *)request;
	struct gendisk *disk;

	if (bpf_core_field_exists(old->rq_disk))
		disk = BPF_CORE_READ(old, rq_disk);
	else
		disk = BPF_CORE_READ(request, q, disk);
	if (!disk)
		return 0;
	return (u32)BPF_CORE_READ(disk, major) << 20 | BPF_CORE_READ(disk, first_minor);
}

SEC("raw_tp/block_rq_insert")
int block_rq_insert(struct bpf_raw_tracepoint_args *ctx)
{
	return enter(request_of(ctx), false);
}

SEC("raw_tp/block_rq_issue")
int block_rq_issue(struct bpf_raw_tracepoint_args *ctx)
{
	return enter(request_of(ctx), true);
}

SEC("raw_tp/block_rq_complete")
int block_rq_complete(struct bpf_raw_tracepoint_args *ctx)
{
	struct request *request = (void *)ctx->args[0];
	u32 bytes = ctx->args[2];
	u64 key = (u64)request, since, elapsed;
	struct device_operation operation;
	struct flight *found, flight;
	struct duration *duration;

	/* Parts of a request complete on their own; the last one counts. */
	if (bytes < BPF_CORE_READ(request, __data_len))
		return 0;
	found = bpf_map_lookup_elem(&in_flight, &key);
	if (!found)
		return 0;
	flight = *found;
	bpf_map_delete_elem(&in_flight, &key);
	/* Not before: of a request that was not noted in the queue, whoever gives it to the device would be the owner. */
	if (!probefleet_selected_process(flight.process) || !probefleet_selected(flight.cgroup))
		return 0;
	since = queued ? flight.inserted : flight.issued;
	if (!since)
		return 0;
	elapsed = bpf_ktime_get_ns() - since;

	__builtin_memset(&operation, 0, sizeof(operation));
	operation.cgroup = flight.cgroup;
	operation.device = device_of(request);
	operation.operation = BPF_CORE_READ(request, cmd_flags) & OPERATION_MASK;
	duration = probefleet_value(&durations, &operation, &no_duration);
	if (duration)
		probefleet_observe(duration->slots, SLOTS, elapsed);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
