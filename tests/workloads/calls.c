// SPDX-License-Identifier: Apache-2.0
/*
 * calls NR COUNT [ARGUMENT...]: makes exactly COUNT calls of system call number NR, all with the same
 * arguments (default: zeros), and reports calls= and failed=.
 *
 * NR is a number, or `rare` for sched_get_priority_max: harmless, without effect, answered in under 100 ns,
 * and made by no libc at start, no shell and no container runtime, so that a whole pod's count is this
 * program's. With the argument -1 each call fails with EINVAL.
 */
#define _GNU_SOURCE
#include "workload.h"

#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char **operands = workload_arguments(argc, argv, "NR|rare COUNT [ARGUMENT...]", NULL, 2, 8);
	long number = strcmp(operands[0], "rare") ? workload_number(operands[0], 0) :
						    SYS_sched_get_priority_max;
	long count = workload_number(operands[1], 0), failed = 0, argument[6] = { 0 };

	for (int i = 0; i < 6 && operands[2 + i]; i++)
		argument[i] = workload_number(operands[2 + i], -1);

	workload_ready("");
	for (long i = 0; i < count; i++) {
		if (syscall(number, argument[0], argument[1], argument[2], argument[3], argument[4],
			    argument[5]) == -1)
			failed++;
		workload_pause();
	}
	workload_done("calls=%ld failed=%ld", count, failed);
	return 0;
}
