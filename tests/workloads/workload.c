// SPDX-License-Identifier: Apache-2.0
/* The phases and the command line that workload.h describes. */
#define _GNU_SOURCE
#include "workload.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define HURRIES_BY 100

static bool held, may_hurry;
static long pause_us;

static void complain(const char *reason, va_list values, int error)
{
	fprintf(stderr, "%s: ", program_invocation_short_name);
	vfprintf(stderr, reason, values);
	fprintf(stderr, error ? ": %s\n" : "%s\n", error ? strerror(error) : "");
}

void workload_fail(const char *reason, ...)
{
	va_list values;

	va_start(values, reason);
	complain(reason, values, 0);
	exit(1);
}

void workload_fail_errno(const char *reason, ...)
{
	int error = errno;
	va_list values;

	va_start(values, reason);
	complain(reason, values, error);
	exit(1);
}

long workload_number(const char *text, long least)
{
	char *end;
	long number;

	errno = 0;
	number = strtol(text, &end, 0);
	if (errno || end == text || *end || number < least)
		workload_fail("%s is not a whole number of at least %ld", text, least);
	return number;
}

char **workload_arguments(int argc, char **argv, const char *usage, const struct flag *flags, int least,
			  int most)
{
	const struct flag common[] = {
		{ "--hold", .is_set = &held },
		{ "--hurry", .is_set = &may_hurry },
		{ "--pause", .number = &pause_us },
		{ 0 },
	};
	int operands = 0;

	for (int i = 1; i < argc; i++) {
		const struct flag *flag = NULL;

		for (const struct flag *f = common; f->name && !flag; f++)
			flag = strcmp(f->name, argv[i]) ? NULL : f;
		for (const struct flag *f = flags; f && f->name && !flag; f++)
			flag = strcmp(f->name, argv[i]) ? NULL : f;
		if (!flag && !strncmp(argv[i], "--", 2))
			goto misuse;
		if (!flag) {
			argv[operands++] = argv[i];
			continue;
		}
		if (flag->is_set) {
			*flag->is_set = true;
			continue;
		}
		if (++i == argc)
			goto misuse;
		if (flag->number)
			*flag->number = workload_number(argv[i], 0);
		else
			*flag->text = argv[i];
	}
	if (operands < least || operands > most)
		goto misuse;
	argv[operands] = NULL;
	return argv;

misuse:
	fprintf(stderr, "usage: %s [--hold] [--pause MICROSECONDS [--hurry]] %s\n", program_invocation_short_name, usage);
	exit(2);
}

/* One write for one line: a reader of the pipe sees whole lines. */
static void report(const char *phase, const char *separator, const char *facts, va_list values)
{
	char line[512];
	int used = snprintf(line, sizeof(line), "%s%s", phase, *facts ? separator : "");

	used += vsnprintf(line + used, sizeof(line) - used - 1, facts, values);
	line[used++] = '\n';
	if (write(STDOUT_FILENO, line, used) != used)
		workload_fail_errno("write to stdout");
}

/* One byte from stdin; false at its end. */
static bool byte_from_stdin(void)
{
	char byte;

	return read(STDIN_FILENO, &byte, 1) == 1;
}

bool workload_ready(const char *facts, ...)
{
	va_list values;

	if (!held)
		return false;
	va_start(values, facts);
	report("ready", "", facts, values);
	va_end(values);
	if (!byte_from_stdin())
		exit(0);
	return true;
}

/* Waits at most one pause for the byte; its coming, or the end of stdin, is looked for no more. */
static void pause_until_told(const struct timespec *pause)
{
	struct pollfd told = { .fd = STDIN_FILENO, .events = POLLIN };

	if (ppoll(&told, 1, pause, NULL) != 1)
		return;
	may_hurry = false;
	if (byte_from_stdin())
		pause_us /= HURRIES_BY;
	else
		workload_pause();
}

void workload_pause(void)
{
	struct timespec pause = { pause_us / 1000000, pause_us % 1000000 * 1000 };

	if (pause_us && may_hurry)
		pause_until_told(&pause);
	else if (pause_us)
		clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
}

void workload_done(const char *facts, ...)
{
	va_list values;

	va_start(values, facts);
	report("done", " ", facts, values);
	va_end(values);
	if (held)
		byte_from_stdin();
}

unsigned long workload_file_offset(const void *function)
{
	unsigned long address = (unsigned long)function, start, end, offset;
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[512];

	if (!maps)
		workload_fail_errno("/proc/self/maps");
	while (fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx %*s %lx", &start, &end, &offset) == 3 && address >= start &&
		    address < end) {
			fclose(maps);
			return address - start + offset;
		}
	}
	workload_fail("the function is in no mapping");
}
