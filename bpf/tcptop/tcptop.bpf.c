// SPDX-License-Identifier: GPL-2.0
/*
 * tcptop: who sends and receives how much by TCP, while it happens: bytes by pod, peer and port of the service.
 *
 * Counted are the bytes that programs hand over and get, when the call returns. Linux 6.3 says them itself
 * ("sock: add tracepoint for send recv length"); before, functions that all calls go through do.
 */
#include "probefleet.h"

#define PROTOCOL_TCP 6
#define FAMILY_IPV6 10
#define PEEK 0x2	/* MSG_PEEK: the bytes stay, and come again */
#define ERROR_QUEUE 0x2000 /* MSG_ERRQUEUE: no data */

const volatile bool processes = false;

struct conversation {
	cgroup_id_t cgroup;
	ip_t peer;
	pid_nr_t process; /* 0 unless asked for */
	port_t port;	  /* of the service: remote where the pod connected, local where it accepted */
	bool accepted;
};

struct traffic {
	u64 sent_bytes;
	u64 received_bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct conversation);
	__type(value, struct traffic);
} traffic SEC(".maps");

static const struct traffic no_traffic;

/* An accepted socket is a copy of the one that listens, and so has its backlog; one that connects has none. */
static __always_inline bool is_accepted(const struct sock *socket)
{
	return BPF_CORE_READ(socket, sk_max_ack_backlog);
}

static __always_inline int count(const struct sock *socket, s64 bytes, bool sent)
{
	pid_nr_t process = probefleet_current_process();
	struct conversation key;
	struct traffic *found;

	if (bytes <= 0 || !probefleet_selected_process(process))
		return 0;
	if (!socket || BPF_CORE_READ(socket, sk_protocol) != PROTOCOL_TCP)
		return 0;
	__builtin_memset(&key, 0, sizeof(key));
	key.cgroup = probefleet_socket_cgroup(socket);
	/* The call runs in the task that uses the socket. */
	if (!key.cgroup)
		key.cgroup = probefleet_current_cgroup();
	if (!probefleet_selected(key.cgroup))
		return 0;
	key.accepted = is_accepted(socket);
	if (key.accepted)
		key.port = BPF_CORE_READ(socket, __sk_common.skc_num);
	else
		key.port = bpf_ntohs(BPF_CORE_READ(socket, __sk_common.skc_dport));
	if (processes)
		key.process = process;
	if (BPF_CORE_READ(socket, __sk_common.skc_family) == FAMILY_IPV6)
		BPF_CORE_READ_INTO(&key.peer, socket, __sk_common.skc_v6_daddr.in6_u.u6_addr8);
	else
		probefleet_map_ipv4(key.peer, BPF_CORE_READ(socket, __sk_common.skc_daddr));
	found = probefleet_value(&traffic, &key, &no_traffic);
	if (!found)
		return 0;
	if (sent)
		__sync_fetch_and_add(&found->sent_bytes, bytes);
	else
		__sync_fetch_and_add(&found->received_bytes, bytes);
	return 0;
}

static __always_inline int received(const struct sock *socket, s64 bytes, int flags)
{
	return flags & (PEEK | ERROR_QUEUE) ? 0 : count(socket, bytes, false);
}

SEC("tp_btf/sock_send_length")
int BPF_PROG(sent_btf, struct sock *socket, int bytes, int flags)
{
	return count(socket, bytes, true);
}

SEC("tp_btf/sock_recv_length")
int BPF_PROG(received_btf, struct sock *socket, int bytes, int flags)
{
	return received(socket, bytes, flags);
}

SEC("raw_tp/sock_send_length")
int BPF_PROG(sent_raw, struct sock *socket, int bytes, int flags)
{
	return count(socket, bytes, true);
}

SEC("raw_tp/sock_recv_length")
int BPF_PROG(received_raw, struct sock *socket, int bytes, int flags)
{
	return received(socket, bytes, flags);
}

/* Before 6.3. What kTLS encrypts comes by here, too, as the program wrote it. */
SEC("fexit/inet_sendmsg")
int BPF_PROG(sent_ipv4, struct socket *socket, struct msghdr *message, size_t size, int result)
{
	return count(socket->sk, result, true);
}

SEC("fexit/inet6_sendmsg")
int BPF_PROG(sent_ipv6, struct socket *socket, struct msghdr *message, size_t size, int result)
{
	return count(socket->sk, result, true);
}

SEC("fexit/inet_recvmsg")
int BPF_PROG(received_ipv4, struct socket *socket, struct msghdr *message, size_t size, int flags, int result)
{
	return received(socket->sk, result, flags);
}

SEC("fexit/inet6_recvmsg")
int BPF_PROG(received_ipv6, struct socket *socket, struct msghdr *message, size_t size, int flags, int result)
{
	return received(socket->sk, result, flags);
}

/* sendfile() and splice() before 6.5, by both families. */
SEC("fexit/inet_sendpage")
int BPF_PROG(sent_page, struct socket *socket, struct page *page, int offset, size_t size, int flags, s64 result)
{
	return count(socket->sk, result, true);
}

/* splice() out of a socket is no receive call for any of the others. */
SEC("fexit/tcp_splice_read")
int BPF_PROG(spliced, struct socket *socket, loff_t *position, struct pipe_inode_info *pipe, size_t length,
	     unsigned int flags, s64 result)
{
	return count(socket->sk, result, false);
}

char LICENSE[] SEC("license") = "GPL";
