/* SPDX-License-Identifier: Apache-2.0 */
/*
 * STATIC_PROBE(PROVIDER, NAME, SEMAPHORE, ARGUMENTS, OPERANDS...): a static probe (USDT) where it stands, as <sys/sdt.h>
 * makes it, written out: that header is in no package that the tests need otherwise.
 *
 * A nop, and a note that says where it is and where its arguments are: "SIZE@OPERAND" for each, SIZE negative for signed
 * ones. SEMAPHORE is the name of an unsigned short in section .probes that counts who listens, or "0".
 */
#ifndef STATIC_PROBE_H
#define STATIC_PROBE_H

/* clang-format off */
#define STATIC_PROBE(provider, name, semaphore, arguments, ...)						\
	__asm__ volatile("990:	nop\n"									\
			 "	.pushsection .note.stapsdt,\"\",\"note\"\n"				\
			 "	.balign 4\n"								\
			 "	.4byte 992f-991f, 994f-993f, 3\n"					\
			 "991:	.asciz \"stapsdt\"\n"							\
			 "992:	.balign 4\n"								\
			 "993:	.8byte 990b\n"								\
			 "	.8byte _.stapsdt.base\n"						\
			 "	.8byte " semaphore "\n"							\
			 "	.asciz \"" provider "\"\n"						\
			 "	.asciz \"" name "\"\n"							\
			 "	.asciz \"" arguments "\"\n"						\
			 "994:	.balign 4\n"								\
			 "	.popsection\n"								\
			 "	.ifndef _.stapsdt.base\n"						\
			 "	.pushsection .stapsdt.base,\"aG\",\"progbits\",.stapsdt.base,comdat\n"	\
			 "	.weak _.stapsdt.base\n"							\
			 "	.hidden _.stapsdt.base\n"						\
			 "_.stapsdt.base: .space 1\n"							\
			 "	.size _.stapsdt.base, 1\n"						\
			 "	.popsection\n"								\
			 "	.endif\n" ::__VA_ARGS__)
/* clang-format on */

#endif
