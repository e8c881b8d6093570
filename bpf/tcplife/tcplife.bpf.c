// SPDX-License-Identifier: GPL-2.0
/*
 * tcplife: every TCP connection when it ends: who with whom, how long, how many bytes.
 *
 * Bytes are those of the stream, both ways: what was sent without what had to be sent again, and what was received
 * without the FIN, which the kernel counts as a byte. Connections that were open at attach are not recorded: their
 * beginning was not seen.
 */
#include "probefleet.h"

#define PROTOCOL_TCP 6
#define FAMILY_IPV6 10

struct side {
	cgroup_id_t cgroup;
	port_t port; /* of the service: remote where the pod connected, local where it accepted */
	bool accepted;
};

struct traffic {
	u64 connections;
	u64 sent_bytes;
	u64 received_bytes;
};

struct event {
	ktime_t_ns time; /* of the end */
	cgroup_id_t cgroup;
	nanoseconds_t duration;
	u64 sent_bytes;
	u64 received_bytes;
	ip_t local;
	ip_t remote;
	pid_nr_t pid; /* who connected or closed it; 0 where that was no task's doing */
	port_t local_port;
	port_t remote_port;
	bool accepted;
	comm_t command;
};

struct life {
	cgroup_id_t cgroup;
	u64 started;
	u32 pid;
	bool accepted;
	bool established;
	comm_t command;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct side);
	__type(value, struct traffic);
} traffic SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
	__type(value, struct event);
} events SEC(".maps");

/* By struct sock, until it is closed, as every socket is before it is freed. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, u64);
	__type(value, struct life);
} lives SEC(".maps");

static const struct traffic no_traffic;

static __always_inline void note_task(struct life *life)
{
	life->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(life->command, sizeof(life->command));
}

static __always_inline void begin(const struct sock *socket, bool accepted)
{
	u64 key = (u64)socket;
	struct life life;

	__builtin_memset(&life, 0, sizeof(life));
	life.cgroup = probefleet_socket_cgroup(socket);
	/* connect() runs in its task; an accepted connection begins in a softirq, and learns its task when it is closed. */
	if (!life.cgroup && !accepted)
		life.cgroup = probefleet_current_cgroup();
	if (life.cgroup && !probefleet_selected(life.cgroup))
		return;
	life.started = bpf_ktime_get_ns();
	life.accepted = accepted;
	life.established = accepted;
	if (!accepted)
		note_task(&life);
	if (bpf_map_update_elem(&lives, &key, &life, BPF_ANY))
		probefleet_count_lost(PROBEFLEET_LOST_UPDATE);
}

/* tcp_fin() marks the socket done; rcv_nxt, and with it bytes_received, has then gone one past the last byte. */
static __always_inline u64 received_bytes(const struct tcp_sock *tcp)
{
	u64 flags = BPF_CORE_READ((const struct sock *)tcp, __sk_common.skc_flags);
	u64 fin = flags >> bpf_core_enum_value(enum sock_flags, SOCK_DONE) & 1;
	u64 bytes = BPF_CORE_READ(tcp, bytes_received);

	return bytes - (bytes ? fin : 0);
}

static __always_inline void read_addresses(struct event *event, const struct sock *socket)
{
	const struct sock_common *common = __builtin_preserve_access_index(&socket->__sk_common);

	if (BPF_CORE_READ(common, skc_family) == FAMILY_IPV6) {
		BPF_CORE_READ_INTO(&event->local, common, skc_v6_rcv_saddr.in6_u.u6_addr8);
		BPF_CORE_READ_INTO(&event->remote, common, skc_v6_daddr.in6_u.u6_addr8);
	} else {
		probefleet_map_ipv4(event->local, BPF_CORE_READ(common, skc_rcv_saddr));
		probefleet_map_ipv4(event->remote, BPF_CORE_READ(common, skc_daddr));
	}
}

static __always_inline void end(const struct sock *socket, const struct life *life)
{
	/* Not skc_num: tcp_set_state() gives the port back before it says so. */
	port_t local = bpf_ntohs(BPF_CORE_READ((const struct inet_sock *)socket, inet_sport));
	port_t remote = bpf_ntohs(BPF_CORE_READ(socket, __sk_common.skc_dport));
	const struct tcp_sock *tcp = (const void *)socket;
	u64 sent = BPF_CORE_READ(tcp, bytes_sent) - BPF_CORE_READ(tcp, bytes_retrans);
	u64 received = received_bytes(tcp);
	struct traffic *traffic_here;
	struct event *event;
	struct side side;

	__builtin_memset(&side, 0, sizeof(side));
	side.cgroup = life->cgroup;
	side.port = life->accepted ? local : remote;
	side.accepted = life->accepted;
	traffic_here = probefleet_value(&traffic, &side, &no_traffic);
	if (traffic_here) {
		__sync_fetch_and_add(&traffic_here->connections, 1);
		__sync_fetch_and_add(&traffic_here->sent_bytes, sent);
		__sync_fetch_and_add(&traffic_here->received_bytes, received);
	}

	event = probefleet_reserve(&events, sizeof(*event));
	if (!event)
		return;
	__builtin_memset(event, 0, sizeof(*event));
	event->time = bpf_ktime_get_ns();
	event->cgroup = life->cgroup;
	event->duration = event->time - life->started;
	event->sent_bytes = sent;
	event->received_bytes = received;
	read_addresses(event, socket);
	event->pid = life->pid;
	event->local_port = local;
	event->remote_port = remote;
	event->accepted = life->accepted;
	__builtin_memcpy(event->command, life->command, sizeof(event->command));
	probefleet_submit(event);
}

static __always_inline int change(const struct sock *socket, int old, int new)
{
	u64 key = (u64)socket;
	struct life *found, life;

	if (BPF_CORE_READ(socket, sk_protocol) != PROTOCOL_TCP)
		return 0;
	if (new == TCP_SYN_SENT) {
		begin(socket, false);
		return 0;
	}
	found = bpf_map_lookup_elem(&lives, &key);
	if (new == TCP_ESTABLISHED) {
		if (found)
			found->established = true;
		else if (old == TCP_SYN_RECV)
			begin(socket, true);
		return 0;
	}
	if (!found)
		return 0;
	/* Only close(), shutdown() and exit make these of an open connection: the task that runs is the socket's. */
	if (!found->pid && (new == TCP_LAST_ACK || (new == TCP_FIN_WAIT1 &&old == TCP_ESTABLISHED))) {
		note_task(found);
		if (!found->cgroup)
			found->cgroup = probefleet_current_cgroup();
	}
	if (new != TCP_CLOSE)
		return 0;
	life = *found;
	bpf_map_delete_elem(&lives, &key);
	/* The process is the record's. Only here it is known: an accepted connection learns its own when it is closed. */
	if (life.established && probefleet_selected_process(life.pid) && probefleet_selected(life.cgroup))
		end(socket, &life);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(set_state_btf, const struct sock *socket, const int old, const int new)
{
	return change(socket, old, new);
}

SEC("raw_tp/inet_sock_set_state")
int BPF_PROG(set_state_raw, const struct sock *socket, const int old, const int new)
{
	return change(socket, old, new);
}

char LICENSE[] SEC("license") = "GPL";
