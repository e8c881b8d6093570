// SPDX-License-Identifier: Apache-2.0
/*
 * hits COUNT: calls probefleet_target(0) … probefleet_target(COUNT - 1), each exactly once, for uprobes and
 * uretprobes. Each call returns 2 × argument + 1. Reports hits= and sum= (of what was returned: COUNT²).
 *
 * "ready offset=N" says where in its file the function lies, for a probe by offset; it is looked up in this
 * process's own mappings, not in the symbol table that a tool under test would read.
 */
#include "workload.h"

#include <stddef.h>

__attribute__((noinline, used)) int probefleet_target(int argument)
{
	__asm__ volatile("" : "+r"(argument)); /* else clang works the result out at the caller's */
	return 2 * argument + 1;
}

int main(int argc, char **argv)
{
	char **operands = workload_arguments(argc, argv, "COUNT", NULL, 1, 1);
	long count = workload_number(operands[0], 0), sum = 0;

	workload_ready(" offset=%lu", workload_file_offset((const void *)probefleet_target));
	for (long i = 0; i < count; i++) {
		sum += probefleet_target((int)i);
		workload_pause();
	}
	workload_done("hits=%ld sum=%ld", count, sum);
	return 0;
}
