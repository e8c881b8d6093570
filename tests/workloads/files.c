// SPDX-License-Identifier: Apache-2.0
/*
 * files COUNT PATH [--writes N] [--size BYTES] [--random]: writes N times BYTES (4096) to a file or block device, and
 * then reads COUNT times as many, each by one pwrite or pread through the page cache. Reports reads=, writes= and bytes=
 * (both together).
 *
 * The k-th call of either kind goes to offset k × BYTES, so that each page of a file that is long enough is read once.
 * --random tells the kernel not to read ahead. The calls of the phases are on pipes, and so on no file.
 */
#define _GNU_SOURCE
#include "workload.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	long reads, writes = 0, size = 4096;
	bool random = false;
	const struct flag flags[] = {
		{ "--writes", .number = &writes }, { "--size", .number = &size }, { "--random", .is_set = &random }, { 0 }
	};
	char **operands = workload_arguments(argc, argv, "COUNT PATH [--writes N] [--size BYTES] [--random]", flags, 2, 2);
	char *buffer;
	int fd;

	reads = workload_number(operands[0], 0);
	if (size <= 0 || !(buffer = malloc(size)))
		workload_fail("--size %ld is no size", size);
	memset(buffer, 'p', size);
	fd = open(operands[1], (writes ? O_RDWR : O_RDONLY) | O_CLOEXEC);
	if (fd < 0)
		workload_fail_errno("open %s", operands[1]);
	if (random && posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM))
		workload_fail("%s takes no advice", operands[1]);

	workload_ready("");
	for (long i = 0; i < writes; i++) {
		if (pwrite(fd, buffer, size, i * size) != size)
			workload_fail_errno("write %s", operands[1]);
		workload_pause();
	}
	for (long i = 0; i < reads; i++) {
		if (pread(fd, buffer, size, i * size) != size)
			workload_fail_errno("read %s", operands[1]);
		workload_pause();
	}
	workload_done("reads=%ld writes=%ld bytes=%ld", reads, writes, (reads + writes) * size);
	return 0;
}
