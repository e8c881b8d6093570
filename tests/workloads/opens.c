// SPDX-License-Identifier: Apache-2.0
/*
 * opens COUNT PATH [--missing N]: opens PATH for reading exactly COUNT times by openat() and closes it, then
 * tries PATH.missing N times, which fails with ENOENT. Reports opens= and missing=.
 *
 * A static program opens nothing at its start, so these are all its openat() calls.
 */
#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char absent[4096];
	long count, missing = 0;
	const struct flag flags[] = { { "--missing", .number = &missing }, { 0 } };
	char **operands = workload_arguments(argc, argv, "COUNT PATH [--missing N]", flags, 2, 2);

	count = workload_number(operands[0], 0);
	if (snprintf(absent, sizeof(absent), "%s.missing", operands[1]) >= (int)sizeof(absent))
		workload_fail("the path is too long");

	workload_ready("");
	for (long i = 0; i < count; i++) {
		int fd = openat(AT_FDCWD, operands[1], O_RDONLY | O_CLOEXEC);

		if (fd < 0)
			workload_fail_errno("open %s", operands[1]);
		close(fd);
		workload_pause();
	}
	for (long i = 0; i < missing; i++) {
		if (openat(AT_FDCWD, absent, O_RDONLY | O_CLOEXEC) != -1 || errno != ENOENT)
			workload_fail("%s is there, and was to be missing", absent);
		workload_pause();
	}
	workload_done("opens=%ld missing=%ld", count, missing);
	return 0;
}
