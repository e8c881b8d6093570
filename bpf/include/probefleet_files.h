/* SPDX-License-Identifier: (LGPL-2.1 OR BSD-2-Clause) */
/*
 * Reading and writing files by system calls: which calls they are, which file they mean, and where in it they begin.
 * Only while the call enters: the descriptor may be another file's when it returns.
 *
 * Not here: mmap, io_uring, splice and copy_file_range, and calls by 32-bit programs.
 */
#ifndef __PROBEFLEET_FILES_H
#define __PROBEFLEET_FILES_H

#include "probefleet.h"

/* The ABI's numbers, which never change. */
#if defined(__TARGET_ARCH_x86)
#define PROBEFLEET_READ 0
#define PROBEFLEET_WRITE 1
#define PROBEFLEET_PREAD 17
#define PROBEFLEET_PWRITE 18
#define PROBEFLEET_READV 19
#define PROBEFLEET_WRITEV 20
#define PROBEFLEET_SENDFILE 40
#define PROBEFLEET_PREADV 295
#define PROBEFLEET_PWRITEV 296
#define PROBEFLEET_PREADV2 327
#define PROBEFLEET_PWRITEV2 328
#define PROBEFLEET_O_DIRECT 040000
#else
#define PROBEFLEET_READ 63
#define PROBEFLEET_WRITE 64
#define PROBEFLEET_PREAD 67
#define PROBEFLEET_PWRITE 68
#define PROBEFLEET_READV 65
#define PROBEFLEET_WRITEV 66
#define PROBEFLEET_SENDFILE 71
#define PROBEFLEET_PREADV 69
#define PROBEFLEET_PWRITEV 70
#define PROBEFLEET_PREADV2 286
#define PROBEFLEET_PWRITEV2 287
#define PROBEFLEET_O_DIRECT 0200000
#endif

#define PROBEFLEET_FILE_TYPE 0170000 /* S_IFMT */
#define PROBEFLEET_REGULAR 0100000   /* S_IFREG */
#define PROBEFLEET_BLOCK 0060000     /* S_IFBLK */

/* Does the call read a file? sendfile() does, whatever it sends it to. */
static __always_inline bool probefleet_is_read(long number)
{
	return number == PROBEFLEET_READ || number == PROBEFLEET_PREAD || number == PROBEFLEET_READV ||
	       number == PROBEFLEET_PREADV || number == PROBEFLEET_PREADV2 || number == PROBEFLEET_SENDFILE;
}

static __always_inline bool probefleet_is_write(long number)
{
	return number == PROBEFLEET_WRITE || number == PROBEFLEET_PWRITE || number == PROBEFLEET_WRITEV ||
	       number == PROBEFLEET_PWRITEV || number == PROBEFLEET_PWRITEV2;
}

/* The open file that such a call means, or NULL. */
static __always_inline struct file *probefleet_file(struct pt_regs *regs, long number)
{
	u32 descriptor = number == PROBEFLEET_SENDFILE ? PT_REGS_PARM2_CORE_SYSCALL(regs) :
							 PT_REGS_PARM1_CORE_SYSCALL(regs);
	struct task_struct *task = (void *)bpf_get_current_task();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **files = BPF_CORE_READ(table, fd), *file = NULL;

	if (descriptor >= BPF_CORE_READ(table, max_fds))
		return NULL;
	bpf_probe_read_kernel(&file, sizeof(file), files + descriptor);
	return file;
}

/* Where in the file the call begins to read or write. */
static __always_inline u64 probefleet_file_position(struct pt_regs *regs, long number, struct file *file)
{
	s64 position = -1;

	if (number == PROBEFLEET_SENDFILE) {
		s64 *where = (void *)PT_REGS_PARM3_CORE_SYSCALL(regs);

		if (where)
			bpf_probe_read_user(&position, sizeof(position), where);
	} else if (number != PROBEFLEET_READ && number != PROBEFLEET_WRITE && number != PROBEFLEET_READV &&
		   number != PROBEFLEET_WRITEV) {
		position = PT_REGS_PARM4_CORE_SYSCALL(regs);
	}
	/* -1: as if there were no position (preadv2) */
	return position < 0 ? BPF_CORE_READ(file, f_pos) : position;
}

#endif /* __PROBEFLEET_FILES_H */
