// SPDX-License-Identifier: GPL-2.0
/*
 * tcpretrans: TCP segments that had to be sent again, by pod, peer and state of the connection.
 *
 * A timer or an acknowledgement makes the kernel send again, in whatever task that finds: whose it is, only the socket
 * says. Counted is what left the machine, as tcpi_total_retrans has it.
 */
#include "probefleet.h"

#define FAMILY_IPV6 10

/* As TCP_* of include/net/tcp_states.h; a connection that a SYN-ACK is sent again for has no socket of its own yet. */
enum tcp_state {
	established = 1,
	syn_sent = 2,
	syn_recv = 3,
	fin_wait1 = 4,
	fin_wait2 = 5,
	time_wait = 6,
	close = 7,
	close_wait = 8,
	last_ack = 9,
	closing = 11,
};

struct connection {
	cgroup_id_t cgroup;
	ip_t peer;
	enum tcp_state state;
	port_t port; /* of the service: remote where the pod connected, local where it accepted */
	bool accepted;
};

struct again {
	u64 segments;
	u64 bytes;
};

struct event {
	ktime_t_ns time;
	cgroup_id_t cgroup;
	ip_t local;
	ip_t remote;
	port_t local_port;
	port_t remote_port;
	enum tcp_state state;
	u32 segments;
	u32 bytes;
	bool accepted;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct connection);
	__type(value, struct again);
} retransmitted SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 19);
	__type(value, struct event);
} events SEC(".maps");

static const struct again no_segments;

/* Newer kernels (6.18 has it, 6.12 not) also call when they could not send: a third argument is then an error. */
struct trace_event_raw_tcp_retransmit_skb___err {
	int err;
} __attribute__((preserve_access_index));

/* A socket and a request for one begin alike: with a struct sock_common. */
static __always_inline void note(cgroup_id_t cgroup, const struct sock_common *common, struct event *event)
{
	struct connection key;
	struct again *found;
	struct event *record;

	if (!probefleet_selected(cgroup))
		return;
	if (BPF_CORE_READ(common, skc_family) == FAMILY_IPV6) {
		BPF_CORE_READ_INTO(&event->local, common, skc_v6_rcv_saddr.in6_u.u6_addr8);
		BPF_CORE_READ_INTO(&event->remote, common, skc_v6_daddr.in6_u.u6_addr8);
	} else {
		probefleet_map_ipv4(event->local, BPF_CORE_READ(common, skc_rcv_saddr));
		probefleet_map_ipv4(event->remote, BPF_CORE_READ(common, skc_daddr));
	}
	event->local_port = BPF_CORE_READ(common, skc_num);
	event->remote_port = bpf_ntohs(BPF_CORE_READ(common, skc_dport));
	event->cgroup = cgroup;

	__builtin_memset(&key, 0, sizeof(key));
	key.cgroup = cgroup;
	__builtin_memcpy(key.peer, event->remote, sizeof(key.peer));
	key.state = event->state;
	key.port = event->accepted ? event->local_port : event->remote_port;
	key.accepted = event->accepted;
	found = probefleet_value(&retransmitted, &key, &no_segments);
	if (found) {
		__sync_fetch_and_add(&found->segments, event->segments);
		__sync_fetch_and_add(&found->bytes, event->bytes);
	}

	record = probefleet_reserve(&events, sizeof(*record));
	if (!record)
		return;
	event->time = bpf_ktime_get_ns();
	*record = *event;
	probefleet_submit(record);
}

static __always_inline int segment(const struct sock *socket, const struct sk_buff *packet)
{
	const struct tcp_skb_cb *control = (const void *)&packet->cb;
	struct event event;

	__builtin_memset(&event, 0, sizeof(event));
	event.state = BPF_CORE_READ(socket, __sk_common.skc_state);
	/* An accepted socket is a copy of the one that listens, and so has its backlog; one that connects has none. */
	event.accepted = BPF_CORE_READ(socket, sk_max_ack_backlog);
	event.segments = BPF_CORE_READ(control, tcp_gso_segs);
	event.bytes = BPF_CORE_READ(packet, len);
	note(probefleet_socket_cgroup(socket), &socket->__sk_common, &event);
	return 0;
}

static __always_inline int synack(const struct sock *listening, const struct request_sock *request)
{
	struct event event;

	__builtin_memset(&event, 0, sizeof(event));
	event.state = syn_recv;
	event.accepted = true;
	event.segments = 1;
	note(probefleet_socket_cgroup(listening), &request->__req_common, &event);
	return 0;
}

SEC("tp_btf/tcp_retransmit_skb")
int retransmit_btf(u64 *ctx)
{
	struct trace_event_raw_tcp_retransmit_skb___err *entry = NULL;

	if (bpf_core_field_exists(entry->err) && (int)ctx[2])
		return 0;
	return segment((void *)ctx[0], (void *)ctx[1]);
}

SEC("raw_tp/tcp_retransmit_skb")
int retransmit_raw(struct bpf_raw_tracepoint_args *ctx)
{
	struct trace_event_raw_tcp_retransmit_skb___err *entry = NULL;

	if (bpf_core_field_exists(entry->err) && (int)ctx->args[2])
		return 0;
	return segment((void *)ctx->args[0], (void *)ctx->args[1]);
}

SEC("tp_btf/tcp_retransmit_synack")
int BPF_PROG(synack_btf, const struct sock *listening, const struct request_sock *request)
{
	return synack(listening, request);
}

SEC("raw_tp/tcp_retransmit_synack")
int BPF_PROG(synack_raw, const struct sock *listening, const struct request_sock *request)
{
	return synack(listening, request);
}

char LICENSE[] SEC("license") = "GPL";
