// SPDX-License-Identifier: Apache-2.0
/*
 * marks COUNT: calls functions with static probes (USDT) COUNT times each, and reports heard=: how many of the second
 * one's calls saw that somebody listens (its semaphore was set).
 *
 *	marks:one(number)		one argument, no semaphore: fires whether or not somebody listens
 *	marks:two(number, text)		two arguments, behind its semaphore
 *	marks:twelve(number, …)		twice, … eleven times the number, and 12: as many arguments as can be
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

__attribute__((noinline)) void twelve(long number)
{
	volatile long times[12];
	volatile int third = (int)(3 * number);

	for (int i = 1; i <= 11; i++)
		times[i] = i * number;
	STATIC_PROBE("marks", "twelve", "0",
		     "-8@%[a] -8@%[b] -4@%[c] -8@%[d] -8@%[e] -8@%[f] -8@%[g] -8@%[h] -8@%[i] -8@%[j] -8@%[k] 4@%[l]",
		     [a] "r"(number), [b] "m"(times[2]), [c] "m"(third), [d] "r"(times[4]), [e] "m"(times[5]),
		     [f] "m"(times[6]), [g] "m"(times[7]), [h] "m"(times[8]), [i] "r"(times[9]), [j] "m"(times[10]),
		     [k] "m"(times[11]), [l] "n"(12));
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
		twelve(number);
		workload_pause();
	}
	workload_done("calls=%ld heard=%ld", count, heard);
	return 0;
}
