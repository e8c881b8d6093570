// SPDX-License-Identifier: Apache-2.0
/*
 * sums COUNT SUMS: calls next_number(1) … next_number(COUNT), then sum_of(4, 9) … sum_of(SUMS + 3, SUMS + 8): two functions
 * to be watched from outside, by uprobes (by symbol, or by where they lie in the file) and by the static probes in them:
 *
 *	sums_one:next(x)	one argument; next_number returns x + 1
 *	sums_two:sum(x, y)	two arguments; sum_of returns x + y
 *
 * Each function is called exactly so often and nowhere else, and each call passes its static probe once. Reports next= and
 * sums=: what all calls of each have returned, added up. "ready next_at=N sum_at=N" says where in the file they lie.
 */
#include "static_probe.h"
#include "workload.h"

#include <stddef.h>

__attribute__((noinline, used)) unsigned long next_number(unsigned long x)
{
	STATIC_PROBE("sums_one", "next", "0", "8@%[x]", [x] "nor"(x));
	return x + 1;
}

__attribute__((noinline, used)) unsigned long sum_of(unsigned long x, unsigned long y)
{
	STATIC_PROBE("sums_two", "sum", "0", "8@%[x] 8@%[y]", [x] "nor"(x), [y] "nor"(y));
	return x + y;
}

int main(int argc, char **argv)
{
	char **operands = workload_arguments(argc, argv, "COUNT SUMS", NULL, 2, 2);
	long count = workload_number(operands[0], 0), sums = workload_number(operands[1], 0);
	unsigned long next = 0, sum = 0;

	workload_ready(" next_at=%lu sum_at=%lu", workload_file_offset((const void *)next_number),
		       workload_file_offset((const void *)sum_of));
	for (long i = 1; i <= count; i++) {
		next += next_number(i);
		workload_pause();
	}
	for (long i = 1; i <= sums; i++) {
		sum += sum_of(i + 3, i + 8);
		workload_pause();
	}
	workload_done("next=%lu sums=%lu", next, sum);
	return 0;
}
