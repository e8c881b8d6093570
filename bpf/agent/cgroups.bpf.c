// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Remembers the path of every cgroup that is made, so that a pod which lived for half a second still has a name when its
 * counts are read. Runs once a node, for the agent itself; pinned, so that nothing is missed while the agent restarts.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

/* A pod's path under systemd's driver has about 190 characters. */
#define PATH_BYTES 256
/* 1,000 pods an hour with three cgroups each, kept for an hour after their end, and some room. */
#define MAX_CGROUPS 16384

struct cgroup_path {
	char text[PATH_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_CGROUPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct cgroup_path);
} cgroups SEC(".maps");

/* The BPF stack holds 512 bytes: too few for two paths. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cgroup_path);
} scratch SEC(".maps");

/* 0: cgroups that found no room. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64);
} probefleet_lost SEC(".maps");

SEC("raw_tracepoint/cgroup_mkdir")
int on_cgroup_mkdir(struct bpf_raw_tracepoint_args *ctx)
{
	struct cgroup *cgroup = (struct cgroup *)ctx->args[0];
	const char *text = (const char *)ctx->args[1];
	__u32 zero = 0;
	struct cgroup_path *path;
	__u64 id;

	/* The v1 hierarchies make cgroups too; bpf_get_current_cgroup_id() speaks of the default one, number 0. */
	if (BPF_CORE_READ(cgroup, root, hierarchy_id))
		return 0;
	path = bpf_map_lookup_elem(&scratch, &zero);
	if (!path)
		return 0;
	__builtin_memset(path, 0, sizeof(*path));
	bpf_probe_read_kernel_str(path->text, sizeof(path->text), text);
	id = BPF_CORE_READ(cgroup, kn, id);
	if (bpf_map_update_elem(&cgroups, &id, path, BPF_ANY)) {
		__u64 *lost = bpf_map_lookup_elem(&probefleet_lost, &zero);

		if (lost)
			*lost += 1;
	}
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
