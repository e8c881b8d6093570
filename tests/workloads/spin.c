// SPDX-License-Identifier: Apache-2.0
/*
 * spin SECONDS: uses that much CPU time in spin_inner(), called by spin_outer(), called by main(); all three
 * keep frame pointers. Reports cpu_us=, the CPU time used between the phases.
 *
 * The clock is asked once in about 10 ms, so more than 99 % of samples have spin_inner on top.
 */
#include "workload.h"

#include <time.h>

#define ROUNDS 20000000UL

static long cpu_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

__attribute__((noinline)) unsigned long spin_inner(unsigned long value)
{
	for (unsigned long i = 0; i < ROUNDS; i++)
		__asm__ volatile("" : "+r"(value)); /* keeps the loop, costs one turn of it */
	return value;
}

__attribute__((noinline)) unsigned long spin_outer(long until_us)
{
	unsigned long value = 0;

	while (cpu_us() < until_us) {
		value += spin_inner(value);
		__asm__ volatile("" : "+r"(value)); /* a call that returns here, not a jump */
	}
	return value;
}

int main(int argc, char **argv)
{
	char **operands = workload_arguments(argc, argv, "SECONDS", NULL, 1, 1);
	long seconds = workload_number(operands[0], 0), began_us;

	workload_ready("");
	began_us = cpu_us();
	spin_outer(began_us + seconds * 1000000);
	workload_done("cpu_us=%ld", cpu_us() - began_us);
	return 0;
}
