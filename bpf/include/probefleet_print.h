/* SPDX-License-Identifier: (LGPL-2.1 OR BSD-2-Clause) */
/*
 * bpf_printk() and bpf_trace_printk() as an output of the policy: each call writes one record into a ring of the
 * program's own, `trace_printk`, and nothing into the trace_pipe that all programs of a machine share.
 *
 * The compiler is given this header first where a program's text prints (wire's clang.py); nobody includes it by hand.
 * Arguments are kept with their types, strings by their text, and the agent puts the line together: so a 5.10 without
 * bpf_snprintf() prints what a 7.x prints. bcc_headers/probefleet_bcc_print.h is the same for BCC.
 */
#ifndef __PROBEFLEET_PRINT_H
#define __PROBEFLEET_PRINT_H

#include <probefleet.h>

/* The kernel's own bpf_trace_printk() keeps 64 bytes of a string (kernel/trace/bpf_trace.c, before 5.13). */
#define PROBEFLEET_PRINT_TEXT 64
#define PROBEFLEET_PRINT_TEXTS 4
#define PROBEFLEET_PRINT_VALUES 12
#define PROBEFLEET_PRINT_FORMAT 128
/* __builtin_classify_type() of a pointer or an array */
#define PROBEFLEET_PRINT_POINTER 5

typedef char print_format_t;
typedef u64 print_values_t;
typedef char print_texts_t;
typedef u32 print_pointers_t; /* bit i: value i is a pointer; its text is in the next place of texts */
typedef u32 print_flags_t;    /* bit 0: the task has to give way (TIF_NEED_RESCHED) */

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

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 512 * 1024);
	__type(value, struct probefleet_print);
} trace_printk SEC(".maps");

/* TIF_NEED_RESCHED: arch/x86/include/asm/thread_info.h, arch/arm64/include/asm/thread_info.h */
#if defined(__TARGET_ARCH_arm64)
#define PROBEFLEET_NEED_RESCHED (1UL << 1)
#else
#define PROBEFLEET_NEED_RESCHED (1UL << 3)
#endif

static __always_inline struct probefleet_print *probefleet_print_begin(const char *format)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	cgroup_id_t cgroup = probefleet_current_cgroup();
	u64 id = bpf_get_current_pid_tgid();
	struct probefleet_print *line;

	if (!probefleet_selected(cgroup))
		return NULL;
	line = probefleet_reserve(&trace_printk, sizeof(*line));
	if (!line)
		return NULL;
	line->cgroup = cgroup;
	line->time = bpf_ktime_get_ns();
	line->pid = id;
	line->tgid = id >> 32;
	line->cpu = bpf_get_smp_processor_id();
	line->flags = !!(BPF_CORE_READ(task, thread_info.flags) & PROBEFLEET_NEED_RESCHED);
	line->pointers = 0;
	bpf_get_current_comm(line->task, sizeof(line->task));
	bpf_probe_read_kernel_str(line->format, sizeof(line->format), format);
	return line;
}

/* Text, and behind it the first bytes as they are: %pI4 and %pI6 read those. Kernel's or user's, as %s does. */
static __always_inline void probefleet_print_text(struct probefleet_print *line, u32 place, u64 pointer)
{
	char *text = &line->texts[place * PROBEFLEET_PRINT_TEXT];

	bpf_probe_read(text, 16, (void *)pointer);
	if (bpf_probe_read_str(text, PROBEFLEET_PRINT_TEXT, (void *)pointer) < 0)
		text[0] = 0;
}

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

#define ___probefleet_print_0()
#define ___probefleet_print_1(x) ___probefleet_print_value(x)
#define ___probefleet_print_2(x, args...) ___probefleet_print_value(x) ___probefleet_print_1(args)
#define ___probefleet_print_3(x, args...) ___probefleet_print_value(x) ___probefleet_print_2(args)
#define ___probefleet_print_4(x, args...) ___probefleet_print_value(x) ___probefleet_print_3(args)
#define ___probefleet_print_5(x, args...) ___probefleet_print_value(x) ___probefleet_print_4(args)
#define ___probefleet_print_6(x, args...) ___probefleet_print_value(x) ___probefleet_print_5(args)
#define ___probefleet_print_7(x, args...) ___probefleet_print_value(x) ___probefleet_print_6(args)
#define ___probefleet_print_8(x, args...) ___probefleet_print_value(x) ___probefleet_print_7(args)
#define ___probefleet_print_9(x, args...) ___probefleet_print_value(x) ___probefleet_print_8(args)
#define ___probefleet_print_10(x, args...) ___probefleet_print_value(x) ___probefleet_print_9(args)
#define ___probefleet_print_11(x, args...) ___probefleet_print_value(x) ___probefleet_print_10(args)
#define ___probefleet_print_12(x, args...) ___probefleet_print_value(x) ___probefleet_print_11(args)
#define ___probefleet_print_nth(_, _1, _2, _3, _4, _5, _6, _7, _8, _9, _10, _11, _12, N, ...) N
#define ___probefleet_print_count(args...)                                                         \
	___probefleet_print_nth(_, ##args, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
#define ___probefleet_print_paste(a, b) a##b
#define ___probefleet_print_apply(name, count) ___probefleet_print_paste(name, count)

#define ___probefleet_print(format, args...)                                                       \
	({                                                                                         \
		struct probefleet_print *___line = probefleet_print_begin(format);                 \
		if (___line) {                                                                     \
			u32 ___index = 0, ___place = 0;                                            \
			___probefleet_print_apply(___probefleet_print_,                            \
						  ___probefleet_print_count(args))(args)           \
				(void) ___index;                                                   \
			(void)___place;                                                            \
			probefleet_submit(___line);                                                \
		}                                                                                  \
		0;                                                                                 \
	})

#undef bpf_printk
#define bpf_printk(fmt, args...)                                                                   \
	({                                                                                         \
		static const char ___format[] = fmt;                                               \
		___probefleet_print(___format, ##args);                                            \
	})
#define bpf_trace_printk(format, size, args...) ___probefleet_print(format, ##args)

#endif /* __PROBEFLEET_PRINT_H */
