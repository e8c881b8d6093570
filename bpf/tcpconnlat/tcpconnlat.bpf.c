// SPDX-License-Identifier: GPL-2.0
/*
 * tcpconnlat: how long TCP connections take to be made, from the first SYN to the answer, and which fail.
 *
 * The answer comes in a softirq, in whatever task: the connection belongs to the socket's cgroup, kept since connect().
 */
#include "probefleet.h"

#define SLOTS 40
#define PROTOCOL_TCP 6

const volatile u64 minimum = 0;

struct target {
	cgroup_id_t cgroup;
	port_t port;
};

struct failure {
	cgroup_id_t cgroup;
	port_t port;
	errno_t error; /* 0: given up by the program itself */
};

struct duration {
	u64 slots[SLOTS];
};

struct attempt {
	cgroup_id_t cgroup;
	u64 started;
	port_t port;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct target);
	__type(value, struct duration);
} durations SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct failure);
	__type(value, u64);
} failures SEC(".maps");

/* By struct sock, from the SYN until the socket leaves SYN_SENT, which every socket does before it is freed. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct attempt);
} attempts SEC(".maps");

static const struct duration no_duration;

static __always_inline void start(const struct sock *socket)
{
	struct attempt attempt;
	u64 key = (u64)socket;

	/* The process is the one that connects; connect() runs in it. */
	if (!probefleet_selected_process(probefleet_current_process()))
		return;
	__builtin_memset(&attempt, 0, sizeof(attempt));
	attempt.cgroup = probefleet_socket_cgroup(socket);
	/* connect() runs in the task that wants the connection. */
	if (!attempt.cgroup)
		attempt.cgroup = probefleet_current_cgroup();
	if (!probefleet_selected(attempt.cgroup))
		return;
	attempt.port = bpf_ntohs(BPF_CORE_READ(socket, __sk_common.skc_dport));
	attempt.started = bpf_ktime_get_ns();
	if (bpf_map_update_elem(&attempts, &key, &attempt, BPF_ANY))
		probefleet_count_lost(PROBEFLEET_LOST_UPDATE);
}

static __always_inline void made(const struct attempt *attempt)
{
	u64 elapsed = bpf_ktime_get_ns() - attempt->started;
	struct duration *duration;
	struct target target;

	if (elapsed < minimum)
		return;
	__builtin_memset(&target, 0, sizeof(target));
	target.cgroup = attempt->cgroup;
	target.port = attempt->port;
	duration = probefleet_value(&durations, &target, &no_duration);
	if (duration)
		probefleet_observe(duration->slots, SLOTS, elapsed);
}

static __always_inline void failed(const struct attempt *attempt, const struct sock *socket)
{
	struct failure failure;

	__builtin_memset(&failure, 0, sizeof(failure));
	failure.cgroup = attempt->cgroup;
	failure.port = attempt->port;
	failure.error = -BPF_CORE_READ(socket, sk_err);
	probefleet_add(&failures, &failure, 1);
}

static __always_inline int change(const struct sock *socket, int new)
{
	struct attempt *found, attempt;
	u64 key = (u64)socket;

	if (BPF_CORE_READ(socket, sk_protocol) != PROTOCOL_TCP)
		return 0;
	if (new == TCP_SYN_SENT) {
		start(socket);
		return 0;
	}
	/* SYN_RECV: both ends connect to each other at once; the answer is still to come. */
	if (new == TCP_SYN_RECV)
		return 0;
	found = bpf_map_lookup_elem(&attempts, &key);
	if (!found)
		return 0;
	attempt = *found;
	bpf_map_delete_elem(&attempts, &key);
	if (new == TCP_ESTABLISHED)
		made(&attempt);
	else
		failed(&attempt, socket);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(set_state_btf, const struct sock *socket, const int old, const int new)
{
	return change(socket, new);
}

SEC("raw_tp/inet_sock_set_state")
int BPF_PROG(set_state_raw, const struct sock *socket, const int old, const int new)
{
	return change(socket, new);
}

char LICENSE[] SEC("license") = "GPL";
