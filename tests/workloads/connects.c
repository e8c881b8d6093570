// SPDX-License-Identifier: Apache-2.0
/*
 * connects COUNT PORT [ADDRESS] [--bytes N]: opens COUNT TCP connections one after the other, sends N bytes (0)
 * on each, reads the same number back, and closes. Reports connects=, refused= and bytes= (sent in all).
 * connects --serve PORT [ADDRESS]: answers those until it is killed, or held and its stdin says so. Port 0
 * picks a free one; "ready port=N" says which.
 *
 * ADDRESS is 127.0.0.1 unless given; IPv4 or IPv6. A connection that is refused counts as such and the next is
 * tried. The client ends its half first and waits for the server's end, so both sockets are closed, in every
 * state that tcp(7) passes through, before the next connection and before the "done" line.
 */
#include "workload.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

union address {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

static char buffer[65536];

static socklen_t parse(union address *to, const char *text, long port)
{
	if (port > 65535)
		workload_fail("there is no port %ld", port);
	memset(to, 0, sizeof(*to));
	if (inet_pton(AF_INET, text, &to->v4.sin_addr) == 1) {
		to->v4.sin_family = AF_INET;
		to->v4.sin_port = htons(port);
		return sizeof(to->v4);
	}
	if (inet_pton(AF_INET6, text, &to->v6.sin6_addr) != 1)
		workload_fail("%s is neither an IPv4 nor an IPv6 address", text);
	to->v6.sin6_family = AF_INET6;
	to->v6.sin6_port = htons(port);
	return sizeof(to->v6);
}

/* Sends `bytes` and reads as many back, a buffer's worth at a time, then the other side's end. */
static void exchange(int fd, long bytes)
{
	for (long left = bytes; left;) {
		long part = left < (long)sizeof(buffer) ? left : (long)sizeof(buffer);

		if (send(fd, buffer, part, MSG_NOSIGNAL) != part)
			workload_fail_errno("send");
		if (recv(fd, buffer, part, MSG_WAITALL) != part)
			workload_fail_errno("receive");
		left -= part;
	}
	if (shutdown(fd, SHUT_WR) || recv(fd, buffer, 1, 0) != 0)
		workload_fail_errno("the server did not close");
}

static int run_client(const union address *to, socklen_t length, long count, long bytes)
{
	long connected = 0, refused = 0;

	workload_ready("");
	for (long i = 0; i < count; i++) {
		int fd = socket(to->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

		if (fd < 0)
			workload_fail_errno("socket");
		if (!connect(fd, &to->any, length)) {
			connected++;
			exchange(fd, bytes);
		} else if (errno == ECONNREFUSED) {
			refused++;
		} else {
			workload_fail_errno("connect");
		}
		close(fd);
		workload_pause();
	}
	workload_done("connects=%ld refused=%ld bytes=%ld", connected, refused, connected * bytes);
	return 0;
}

/* Sends everything back until the client ends its half. */
static void echo(int fd)
{
	ssize_t part;

	while ((part = recv(fd, buffer, sizeof(buffer), 0)) > 0)
		for (ssize_t sent = 0, now; sent < part; sent += now)
			if ((now = send(fd, buffer + sent, part - sent, MSG_NOSIGNAL)) < 0)
				return; /* the client is gone: its own exit status tells */
}

static int run_server(union address *at, socklen_t length)
{
	int on = 1, listener = socket(at->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	long served = 0;
	/* Without --hold stdin may be at its end already, as in a container: then only a signal ends us. */
	struct pollfd from[] = { { listener, POLLIN, 0 }, { STDIN_FILENO, POLLIN, 0 } };
	bool held;

	if (listener < 0)
		workload_fail_errno("socket");
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listener, &at->any, length) || listen(listener, 4096) ||
	    getsockname(listener, &at->any, &length))
		workload_fail_errno("listen");
	/* sin_port and sin6_port lie at the same place */
	held = workload_ready(" port=%d", ntohs(at->v4.sin_port));
	while (poll(from, held ? 2 : 1, -1) > 0 && !from[1].revents) {
		int fd = accept(listener, NULL, NULL);

		if (fd < 0)
			workload_fail_errno("accept");
		echo(fd);
		close(fd);
		served++;
	}
	workload_done("served=%ld", served);
	return 0;
}

int main(int argc, char **argv)
{
	bool serve = false;
	long bytes = 0;
	const struct flag flags[] = { { "--serve", .is_set = &serve }, { "--bytes", .number = &bytes }, { 0 } };
	char **operands = workload_arguments(
		argc, argv, "COUNT PORT [ADDRESS] [--bytes N] | --serve PORT [ADDRESS]", flags, 1, 3);
	long count = serve ? 0 : workload_number(*operands++, 0);
	union address address;
	socklen_t length;

	if (!*operands)
		workload_fail("no port");
	length = parse(&address, operands[1] ? operands[1] : "127.0.0.1", workload_number(operands[0], 0));
	return serve ? run_server(&address, length) : run_client(&address, length, count, bytes);
}
