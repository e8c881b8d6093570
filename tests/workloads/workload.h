/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What all workloads share: their command line, their phases, their report.
 *
 * A workload makes an exact number of events. Started with --hold it goes through these phases, so that a
 * test can put it into a cgroup and attach probes before the first event, and read counters after the last:
 *
 *	writes "ready[ key=number...]\n"    it has done nothing yet
 *	reads one byte                      go; the end of stdin instead means: leave without doing anything
 *	                                    the events; with --hurry, one byte meanwhile makes them follow each
 *	                                    other a hundred times as fast
 *	writes "done key=number...\n"       what it did, as it counted itself
 *	reads one byte, or the end          may exit
 *
 * Without --hold it goes at once, writes the "done" line and exits. What a phase itself costs (a write, a
 * read, the wake-up by the byte) is never of the kind that the workload counts, unless its text says so.
 * Exit status: 0, or 1 with the reason on stderr when the numbers cannot be what was asked for.
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <stdbool.h>

/* An option of one workload: --name NUMBER, --name TEXT, or (is_set) just --name. */
struct flag {
	const char *name;
	long *number;
	const char **text;
	bool *is_set;
};

/*
 * Reads the options (those of `flags`, which ends with a zero name, and the common --hold, --hurry and
 * --pause MICROSECONDS) and returns the operands; fewer than `least` or more than `most` print `usage`.
 */
char **workload_arguments(int argc, char **argv, const char *usage, const struct flag *flags, int least,
			  int most);

/*
 * Holds before the events; false if there was no --hold. `facts` is a printf format of " key=number" pairs, or "".
 */
bool workload_ready(const char *facts, ...) __attribute__((format(printf, 1, 2)));

/*
 * Waits --pause between two events, so that a run lasts long enough to be disturbed; with --hurry, until it was
 * disturbed enough.
 */
void workload_pause(void);

/* Reports and holds after the events. `facts` as above, without the leading space. */
void workload_done(const char *facts, ...) __attribute__((format(printf, 1, 2)));

/*
 * Where a function of this program lies in the program's file, by this process's own mappings: not by the symbol table,
 * which a tool under test would read.
 */
unsigned long workload_file_offset(const void *function);

/* A whole number of at least `least`, decimal or 0x; anything else ends the program. */
long workload_number(const char *text, long least);

/* Ends the program with a reason; the second adds errno's. */
void workload_fail(const char *reason, ...) __attribute__((format(printf, 1, 2), noreturn));
void workload_fail_errno(const char *reason, ...) __attribute__((format(printf, 1, 2), noreturn));

#endif
