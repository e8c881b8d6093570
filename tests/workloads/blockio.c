// SPDX-License-Identifier: Apache-2.0
/*
 * blockio COUNT DEVICE [--writes N] [--size BYTES]: reads COUNT blocks and then writes N blocks of BYTES (4096)
 * to a block device, one at a time, past the page cache (O_DIRECT). Reports reads=, writes= and bytes=.
 *
 * On a block device each is exactly one request: there is nothing to merge it with, since the next one starts
 * when it is complete, and BYTES is below what any device takes at once. (A file on a file system would add the
 * journal's requests.) The k-th request of either kind goes to offset k × BYTES, beginning anew at the end.
 */
#define _GNU_SOURCE
#include "workload.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	long reads, writes = 0, size = 4096, blocks;
	const struct flag flags[] = { { "--writes", .number = &writes }, { "--size", .number = &size }, { 0 } };
	char **operands = workload_arguments(argc, argv, "COUNT DEVICE [--writes N] [--size BYTES]", flags, 2, 2);
	unsigned long device_bytes;
	void *block;
	int fd;

	reads = workload_number(operands[0], 0);
	fd = open(operands[1], O_RDWR | O_DIRECT | O_CLOEXEC);
	if (fd < 0)
		workload_fail_errno("open %s", operands[1]);
	if (ioctl(fd, BLKGETSIZE64, &device_bytes))
		workload_fail_errno("%s is not a block device", operands[1]);
	if (size <= 0 || size % 512 || size > 65536)
		workload_fail("--size %ld is not a multiple of 512 up to 65536", size);
	blocks = device_bytes / size;
	if (!blocks || posix_memalign(&block, 4096, size))
		workload_fail("%s has no room for one block", operands[1]);
	memset(block, 'p', size);

	workload_ready("");
	for (long i = 0; i < reads; i++) {
		if (pread(fd, block, size, i % blocks * size) != size)
			workload_fail_errno("read %s", operands[1]);
		workload_pause();
	}
	for (long i = 0; i < writes; i++) {
		if (pwrite(fd, block, size, i % blocks * size) != size)
			workload_fail_errno("write %s", operands[1]);
		workload_pause();
	}
	workload_done("reads=%ld writes=%ld bytes=%ld", reads, writes, (reads + writes) * size);
	return 0;
}
