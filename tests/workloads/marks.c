// SPDX-License-Identifier: Apache-2.0
/*
 * marks COUNT: calls two functions with static probes (USDT) COUNT times each, and reports heard=: how many of the second
 * one's calls saw that somebody listens (its semaphore was set).
 *
 *	marks:one(number)		one argument, no semaphore: fires whether or not somebody listens
 *	marks:two(number, text)		two arguments, behind its semaphore
 *
 * number counts from 1; it is negative for every 23rd call. text is "even" or "odd".
 */
#include "static_probe.h"
#include "workload.h"

#include <stddef.h>

__attribute__((section(".probes"))) volatile unsigned short marks_two_semaphore;
static long heard;

__attribute__((noinline)) void one(int number)
{
	STATIC_PROBE("marks", "one", "0", "-4@%[number]", [number] "nor"(number));
}

__attribute__((noinline)) void two(long number, const char *text)
{
	if (!marks_two_semaphore)
		return;
	heard++;
	STATIC_PROBE("marks", "two", "marks_two_semaphore", "-8@%[number] 8@%[text]", [number] "nor"(number),
		     [text] "nor"(text));
}

int main(int argc, char **argv)
{
	char **operands = workload_arguments(argc, argv, "COUNT", NULL, 1, 1);
	long count = workload_number(operands[0], 0);

	workload_ready("");
	for (long i = 1; i <= count; i++) {
		long number = i % 23 ? i : -i;

		one((int)number);
		two(number, i % 2 ? "odd" : "even");
		workload_pause();
	}
	workload_done("calls=%ld heard=%ld", count, heard);
	return 0;
}
