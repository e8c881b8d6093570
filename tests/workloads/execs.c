// SPDX-License-Identifier: Apache-2.0
/*
 * execs COUNT [--failing N]: forks COUNT children that execute this same program (as `execs exit NUMBER`,
 * which exits at once), then N children whose execve() finds no such file. Reports execs= and failed=.
 *
 * So execve is called exactly COUNT + N times, COUNT of them succeed, and each success has arguments that
 * say which one it was: NUMBER runs from 0 to COUNT - 1.
 */
#include "workload.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MISSING "/nonexistent/probefleet-execs"

/* Forks, executes `path`, and returns whether that succeeded. */
static bool execute(const char *path, long number)
{
	char text[24];
	char *argv[] = { "execs", "exit", text, NULL };
	char *environment[] = { NULL };
	int status;
	pid_t child;

	snprintf(text, sizeof(text), "%ld", number);
	child = fork();
	if (child < 0)
		workload_fail_errno("fork");
	if (!child) {
		execve(path, argv, environment);
		_exit(errno == ENOENT ? 127 : 126);
	}
	if (waitpid(child, &status, 0) != child)
		workload_fail_errno("waitpid");
	if (status && !(WIFEXITED(status) && WEXITSTATUS(status) == 127))
		workload_fail("execve of %s: the child ended with wait status %#x", path, status);
	return !status;
}

int main(int argc, char **argv)
{
	long count, failing = 0, executed = 0, failed = 0;
	const struct flag flags[] = { { "--failing", .number = &failing }, { 0 } };
	char **operands;

	if (argc == 3 && !strcmp(argv[1], "exit"))
		return 0;
	operands = workload_arguments(argc, argv, "COUNT [--failing N]", flags, 1, 1);
	count = workload_number(operands[0], 0);

	workload_ready("");
	for (long i = 0; i < count; i++) {
		executed += execute("/proc/self/exe", i);
		workload_pause();
	}
	for (long i = 0; i < failing; i++) {
		failed += !execute(MISSING, i);
		workload_pause();
	}
	if (executed != count || failed != failing)
		workload_fail("%ld of %ld executed, %ld of %ld failed", executed, count, failed, failing);
	workload_done("execs=%ld failed=%ld", executed, failed);
	return 0;
}
