"""What the planner reads of BCC's C: tables and structs, as far as the text itself decides what is there."""

from __future__ import annotations

from probefleet_core import bcc_source

SOURCE = """
#define USER_STACKS
struct data_t {
    u64 id;
    char comm[TASK_COMM_LEN]; // not { here
#ifdef GRAB_ARGS
    u64 args[6];
#endif
#if defined(USER_STACKS) || defined(KERNEL_STACKS)
    int stack_id;
#else
    int no_stack_id;
#endif
#ifndef USER_STACKS
    int never;
#endif
#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 11, 0)
    int old;
#endif
#ifdef CONFIG_CGROUPS
    u64 cgroup;
#endif
};
BPF_PERF_OUTPUT(events);
#ifdef GRAB_ARGS
BPF_HASH(entries, u64, struct data_t);
#endif
#if 0
BPF_HASH(seen);
#endif
#if CGROUPSET
BPF_HASH(cgroups);
#endif
"""


def test_members_that_the_text_switches_off_are_not_there() -> None:
    assert bcc_source.fields_of(SOURCE, "struct data_t") == ("id", "comm", "stack_id", "old", "cgroup")


def test_tables_that_the_text_switches_off_are_not_there() -> None:
    assert [each.name for each in bcc_source.tables(SOURCE)] == ["events"]
    assert [each.name for each in bcc_source.tables("#define GRAB_ARGS 1\n" + SOURCE)] == ["events", "entries"]


def test_what_could_be_hidden_from_us_is_still_read() -> None:
    """Whether a helper is refused is decided by the whole text."""
    assert "bpf_override_return" in bcc_source.without_comments("#ifdef X\nbpf_override_return(ctx, 1);\n#endif")
