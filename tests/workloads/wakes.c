// SPDX-License-Identifier: Apache-2.0
/*
 * wakes COUNT: a sleeper, which is this process's child, is woken exactly COUNT times by this process.
 * wakes --sleeper FIFO COUNT, wakes --waker FIFO COUNT: the same by two processes that share nothing but a
 * folder, so that they can lie in two cgroups, or in two pods. FIFO and FIFO.asleep are made if missing.
 *
 * Reports wakes= (COUNT: from the sleeper's sleep in read() to the CPU by the waker's write()) and repeated=.
 *
 * A byte that comes before the sleeper has gone to sleep wakes nobody, and no lock can tell the waker when the
 * sleeper is off its CPU. So the sleeper looks at the scheduler's own ledger, getrusage()'s voluntary switches:
 * a read that returned without one does not count and is repeated (repeated=). The waker's pause before each
 * byte makes that rare; exactness does not depend on it.
 *
 * Every sleep that is not part of the count (the waker's, the phases', a child's birth) is in the same ledger:
 * a test reads it for all tasks from /proc/PID/status, see Workload.switches() in run.py.
 */
#define _GNU_SOURCE
#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const struct timespec PAUSE = { .tv_nsec = 500000 }; /* 50 times what going to sleep takes */

struct result {
	long wakes, repeated;
};

static long sleeps(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_nvcsw;
}

/* Says "asleep soon", sleeps until a byte comes, and counts if it did sleep, until `count` are reached. */
static struct result be_woken(int bytes, int asleep, long count)
{
	struct result result = { 0 };

	while (result.wakes < count) {
		char byte = '.';
		long before;

		if (write(asleep, &byte, 1) != 1)
			workload_fail_errno("the waker is gone");
		before = sleeps();
		if (read(bytes, &byte, 1) != 1)
			workload_fail("the waker is gone");
		if (sleeps() > before)
			result.wakes++;
		else
			result.repeated++;
	}
	return result;
}

/* Sends one byte for each "asleep soon", until the sleeper has had enough. */
static long wake(int bytes, int asleep)
{
	long sent = 0;
	char byte;

	while (read(asleep, &byte, 1) == 1) {
		clock_nanosleep(CLOCK_MONOTONIC, 0, &PAUSE, NULL);
		if (write(bytes, &byte, 1) != 1)
			workload_fail_errno("the sleeper is gone");
		sent++;
		workload_pause();
	}
	return sent;
}

static int open_fifo(const char *path, const char *suffix, int mode)
{
	char whole[4096];
	int fd;

	snprintf(whole, sizeof(whole), "%s%s", path, suffix);
	if (mkfifo(whole, 0666) && errno != EEXIST)
		workload_fail_errno("mkfifo %s", whole);
	fd = open(whole, mode | O_CLOEXEC); /* waits for the other side */
	if (fd < 0)
		workload_fail_errno("open %s", whole);
	return fd;
}

static void run_sleeper(const char *fifo, long count)
{
	struct result result;
	int bytes, asleep;

	workload_ready("");
	bytes = open_fifo(fifo, "", O_RDONLY);
	asleep = open_fifo(fifo, ".asleep", O_WRONLY);
	result = be_woken(bytes, asleep, count);
	close(asleep);
	workload_done("wakes=%ld repeated=%ld", result.wakes, result.repeated);
}

static void run_waker(const char *fifo, long count)
{
	int bytes, asleep;
	long sent;

	workload_ready("");
	bytes = open_fifo(fifo, "", O_WRONLY);
	asleep = open_fifo(fifo, ".asleep", O_RDONLY);
	sent = wake(bytes, asleep);
	if (sent < count)
		workload_fail("the sleeper left after %ld of %ld wake-ups", sent, count);
	workload_done("wakes=%ld repeated=%ld", count, sent - count);
}

static void run_both(long count)
{
	int bytes[2], asleep[2], results[2], release[2];
	struct result result;
	char byte;

	workload_ready("");
	if (pipe(bytes) || pipe(asleep) || pipe(results) || pipe(release))
		workload_fail_errno("pipe");
	switch (fork()) {
	case -1:
		workload_fail_errno("fork");
	case 0:
		close(bytes[1]);
		close(asleep[0]);
		close(results[0]);
		close(release[1]);
		result = be_woken(bytes[0], asleep[1], count);
		close(asleep[1]);
		if (write(results[1], &result, sizeof(result)) != sizeof(result))
			_exit(1);
		/* Stays asleep until the parent may go: its ledger is read while it is there. */
		_exit(read(release[0], &byte, 1) != 0);
	}
	close(bytes[0]);
	close(asleep[1]);
	close(results[1]);
	close(release[0]);
	wake(bytes[1], asleep[0]);
	if (read(results[0], &result, sizeof(result)) != sizeof(result) || result.wakes != count)
		workload_fail("the sleeper failed");
	workload_done("wakes=%ld repeated=%ld", result.wakes, result.repeated);
	close(release[1]);
	wait(NULL);
}

int main(int argc, char **argv)
{
	const char *sleeper = NULL, *waker = NULL;
	const struct flag flags[] = { { "--sleeper", .text = &sleeper }, { "--waker", .text = &waker }, { 0 } };
	char **operands = workload_arguments(argc, argv, "[--sleeper FIFO | --waker FIFO] COUNT", flags, 1, 1);
	long count = workload_number(operands[0], 0);

	if (sleeper && waker)
		workload_fail("either a sleeper or a waker");
	if (sleeper)
		run_sleeper(sleeper, count);
	else if (waker)
		run_waker(waker, count);
	else
		run_both(count);
	return 0;
}
