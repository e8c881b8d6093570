// SPDX-License-Identifier: Apache-2.0
/*
 * marks COUNT: calls two functions with static probes (USDT) COUNT times each, and reports heard=: how many of the second
 * one's calls saw that somebody listens (its semaphore was set).
 *
 *	marks:one(number)		one argument, no semaphore: fires whether or not somebody listens
 *	marks:two(number, text)		two arguments, behind its semaphore
 *
 * number counts from 1; it is negative for every 23rd call. text is "even" or "odd".
 * The notes are those of <sys/sdt.h>, written out: that header is in no package that the tests need otherwise.
 */
#include "workload.h"

#include <stddef.h>

#define STRING_(text) #text
#define STRING(text) STRING_(text)

/* A nop, and a note that says where it is and where its arguments are: "SIZE@OPERAND", negative for signed. */
#define PROBE(name, semaphore, arguments, ...)                                                                         \
	__asm__ volatile("990:	nop\n"                                                                                  \
			 "	.pushsection .note.stapsdt,\"\",\"note\"\n"                                                 \
			 "	.balign 4\n"                                                                                \
			 "	.4byte 992f-991f, 994f-993f, 3\n"                                                           \
			 "991:	.asciz \"stapsdt\"\n"                                                                   \
			 "992:	.balign 4\n"                                                                            \
			 "993:	.8byte 990b\n"                                                                          \
			 "	.8byte _.stapsdt.base\n"                                                                    \
			 "	.8byte " semaphore "\n"                                                                \
			 "	.asciz \"marks\"\n"                                                                         \
			 "	.asciz \"" STRING(                                                                     \
				 name) "\"\n"                                                                          \
				       "	.asciz \"" arguments "\"\n"                                              \
				       "994:	.balign 4\n"                                                              \
				       "	.popsection\n"                                                                \
				       "	.ifndef _.stapsdt.base\n"                                                     \
				       "	.pushsection .stapsdt.base,\"aG\",\"progbits\",.stapsdt.base,comdat\n"        \
				       "	.weak _.stapsdt.base\n"                                                       \
				       "	.hidden _.stapsdt.base\n"                                                     \
				       "_.stapsdt.base: .space 1\n"                                                    \
				       "	.size _.stapsdt.base, 1\n"                                                    \
				       "	.popsection\n"                                                                \
				       "	.endif\n" ::__VA_ARGS__)

__attribute__((section(".probes"))) volatile unsigned short marks_two_semaphore;
static long heard;

__attribute__((noinline)) void one(int number)
{
	PROBE(one, "0", "-4@%[number]", [number] "nor"(number));
}

__attribute__((noinline)) void two(long number, const char *text)
{
	if (!marks_two_semaphore)
		return;
	heard++;
	PROBE(two, "marks_two_semaphore", "-8@%[number] 8@%[text]", [number] "nor"(number), [text] "nor"(text));
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
