/* SPDX-License-Identifier: (LGPL-2.1 OR BSD-2-Clause) */
/*
 * bpf/include/probefleet_print.h for BCC: bpf_trace_printk() writes into `trace_printk`, a ring of the program's own. The
 * table and the two functions that use it stand in the main file (bcc_source._PRINTS), where BCC rewrites map operations.
 *
 * BCC turns bpf_trace_printk("…", a) into ({ char _fmt[] = "…"; bpf_trace_printk_(_fmt, sizeof(_fmt), a); }) and compiles
 * that; the macro of that name takes it from there.
 */
#pragma once

#define PROBEFLEET_PRINT_TEXT 64
#define PROBEFLEET_PRINT_TEXTS 4
#define PROBEFLEET_PRINT_VALUES 12
#define PROBEFLEET_PRINT_FORMAT 128
#define PROBEFLEET_PRINT_POINTER 5

typedef char print_format_t;
typedef u64 print_values_t;
typedef char print_texts_t;
typedef u32 print_pointers_t;
typedef u32 print_flags_t;

struct probefleet_print {
	cgroup_id_t cgroup;
	ktime_t_ns time;
	comm_t task;
	tid_nr_t pid;
	tid_nr_t tgid;
	u32 cpu;
	print_flags_t flags;
	print_format_t format[PROBEFLEET_PRINT_FORMAT];
	print_values_t values[PROBEFLEET_PRINT_VALUES];
	print_texts_t texts[PROBEFLEET_PRINT_TEXTS * PROBEFLEET_PRINT_TEXT];
	print_pointers_t pointers;
	print_pointers_t unused;
};

#ifdef CONFIG_ARM64
#define PROBEFLEET_NEED_RESCHED (1UL << 1)
#else
#define PROBEFLEET_NEED_RESCHED (1UL << 3)
#endif

#define ___probefleet_print_value(x)                                                               \
	do {                                                                                       \
		u64 ___value = (u64)(x);                                                           \
		___line->values[___index] = ___value;                                              \
		if (__builtin_classify_type(x) == PROBEFLEET_PRINT_POINTER) {                      \
			___line->pointers |= 1U << ___index;                                       \
			if (___place < PROBEFLEET_PRINT_TEXTS)                                     \
				probefleet_print_text(___line, ___place, ___value);                \
			___place++;                                                                \
		}                                                                                  \
		___index++;                                                                        \
	} while (0);

/* The kernel's own takes three values, and BCC says so at the fourth. */
#define ___probefleet_print_0()
#define ___probefleet_print_1(x) ___probefleet_print_value(x)
#define ___probefleet_print_2(x, args...) ___probefleet_print_value(x) ___probefleet_print_1(args)
#define ___probefleet_print_3(x, args...) ___probefleet_print_value(x) ___probefleet_print_2(args)
#define ___probefleet_print_nth(_, _1, _2, _3, N, ...) N
#define ___probefleet_print_count(args...) ___probefleet_print_nth(_, ##args, 3, 2, 1, 0)
#define ___probefleet_print_paste(a, b) a##b
#define ___probefleet_print_apply(name, count) ___probefleet_print_paste(name, count)

#define bpf_trace_printk_(format, size, args...)                                                   \
	({                                                                                         \
		struct probefleet_print *___line = probefleet_print_begin(format);                 \
		if (___line) {                                                                     \
			u32 ___index = 0, ___place = 0;                                            \
			___probefleet_print_apply(___probefleet_print_,                            \
						  ___probefleet_print_count(args))(args)           \
				(void) ___index;                                                   \
			(void)___place;                                                            \
			probefleet_print_end(___line);                                             \
		}                                                                                  \
		0;                                                                                 \
	})
