"""What is done to a BCC program's text before it is compiled."""

from __future__ import annotations

import pytest
from probefleet_agent.kernel import bcc_source

FORMAT = """name: sys_enter_execve
ID: 777
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:int __syscall_nr;\toffset:8;\tsize:4;\tsigned:1;
\tfield:const char * filename;\toffset:16;\tsize:8;\tsigned:0;
\tfield:const char *const * argv;\toffset:24;\tsize:8;\tsigned:0;
\tfield:char comm[16];\toffset:32;\tsize:16;\tsigned:0;
\tfield:__data_loc char[] name;\toffset:48;\tsize:4;\tsigned:0;
\tfield:unsigned long args[6];\toffset:56;\tsize:48;\tsigned:0;
\tfield:pid_t pid;\toffset:104;\tsize:4;\tsigned:1;

print fmt: "x"
"""


def test_a_tracepoints_struct_has_every_field_at_its_offset() -> None:
    text = bcc_source.tracepoint_struct("syscalls", "sys_enter_execve", FORMAT)
    assert [line.strip() for line in text.splitlines()] == [
        "struct tracepoint__syscalls__sys_enter_execve {",
        "u16 common_type;",
        "u8 common_flags;",
        "u8 common_preempt_count;",
        "s32 common_pid;",
        "s32 __syscall_nr;",
        "char __pad12[4];",
        "char *filename;",
        "char *argv;",
        "char comm[16];",
        "int data_loc_name;",
        "char __pad52[4];",
        "unsigned long args[6];",
        "s32 pid;",
        "} __attribute__((packed, aligned(8)));",
    ]


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        ("tracepoint__syscalls__sys_enter_execve", ("tracepoint", "sys_enter_execve", "syscalls")),
        ("kprobe__tcp_sendmsg", ("kprobe", "tcp_sendmsg", "")),
        ("kretprobe__vfs_read", ("kretprobe", "vfs_read", "")),
        ("raw_tracepoint__sys_enter", ("raw_tracepoint", "sys_enter", "")),
        ("kfunc__vmlinux__do_unlinkat", ("fentry", "do_unlinkat", "")),
        ("syscall__execve", ("syscall", "execve", "")),
        ("on_event", ("", "", "")),
        ("tracepoint__syscalls", ("", "", "")),
        ("kprobe__", ("", "", "")),
    ],
)
def test_names_say_where_a_function_goes(function: str, hint: tuple[str, str, str]) -> None:
    found = bcc_source.hint_of(function)
    assert (found.kind, found.target, found.category) == hint


def test_tracepoints_are_found_where_they_are_used_and_not_in_comments() -> None:
    source = """
// TRACEPOINT_PROBE(in, comment)
TRACEPOINT_PROBE( sched , sched_switch ) { return 0; }
int f(struct tracepoint__block__block_rq_issue *args) { return 0; }
"""
    assert bcc_source.tracepoints(source) == (("sched", "sched_switch"), ("block", "block_rq_issue"))


def test_only_kernel_headers_are_made_up() -> None:
    names = ["<linux/sched.h>", '"net/sock.h"', "<bcc/proto.h>", '"/etc/shadow"', '"../x.h"']
    source = "".join(f"#include {name}\n" for name in names)
    assert bcc_source.wrappers(source) == ("linux/sched.h", "net/sock.h")


def test_lines_keep_their_numbers() -> None:
    source = "#include <probefleet.h>\nBPF_PERF_OUTPUT(out);\nstruct sent { u32 pid; };\n"
    text = bcc_source.prepared(source)
    assert text.splitlines()[1:3] == source.splitlines()[1:3]
    assert "probefleet_selected" in text.splitlines()[0]
    assert "struct sent __probefleet_keep_0" in text
    assert bcc_source.prepared(source, keep=False).count("\n") == source.count("\n")
