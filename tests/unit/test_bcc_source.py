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


def test_lines_are_numbered_where_a_directive_may_stand() -> None:
    text = "#define ADD(v) \\\n\t(v) += 1;  /* more */ \\\n\tx\nint f(a,\n  b) { // first\n\treturn g(1,\n\t2);\n}"
    made = bcc_source.numbered(text).split("\n")
    assert made[0] == '#line 1 "/virtual/policy.c"'
    assert [line for line in made if not line.startswith("#line")] == text.split("\n")
    assert [made[at - 1] for at, line in enumerate(made) if line.startswith("#line ") and at] == [
        "  b) { // first",
        "\t2);",
        "}",
    ]
    assert made[made.index("  b) { // first") + 1] == "#line 6"


def test_what_stands_before_the_authors_first_line_is_not_his() -> None:
    text = "static int ours;\n#line 1\nint f() {\n}"
    assert bcc_source.numbered(text).startswith('static int ours;\n#line 1 "/virtual/policy.c"\nint f() {\n#line 2\n')
    assert bcc_source.written(text) == ["int f() {", "}"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("int f(struct pt_regs *ctx)", True),
        ("int f(const struct pt_regs* ctx, int fd)", True),
        ("int f(void *ctx)", False),
        ("// int f(struct pt_regs *ctx)\nint f(void *ctx)", False),
        ("int g(struct pt_regs *ctx)", False),
    ],
)
def test_a_function_with_registers_as_its_context_is_for_a_kprobe(source: str, expected: bool) -> None:
    assert bcc_source.reads_registers(source, "f") == expected


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("void *ctx", True),
        ("struct bpf_raw_tracepoint_args *ctx", True),
        ("const struct pt_regs* c", True),
        ("struct pt_regs *ctx, int number", False),
        ("u32 key", False),
        ("void", False),
    ],
)
def test_a_function_that_takes_a_context_alone_can_be_jumped_to(parameters: str, expected: bool) -> None:
    assert bcc_source.takes_a_context(f"// f(void *ctx)\nint f({parameters}) {{ return 0; }}", "f") == expected


PRINTING = """int f(void *ctx)
{
	bpf_trace_printk("hello");
	return 0;
}
"""


def test_a_text_that_prints_is_given_a_ring_before_its_first_line() -> None:
    assert bcc_source.prints(PRINTING) and not bcc_source.prints('// bpf_trace_printk("no");\nint x;\n')
    before = bcc_source.prologue(PRINTING)
    assert (
        before.endswith("\n#line 1\n") and "BPF_RINGBUF_OUTPUT(trace_printk" in before and "probefleet_lost" in before
    )
    assert bcc_source.prepared(PRINTING).startswith(PRINTING)
    assert "struct probefleet_print __probefleet_keep_0" in bcc_source.prepared(PRINTING)
    # With our own header the functions take its line, so that --pid and the numbers of lines stay right.
    ours = "#include <probefleet.h>\n" + PRINTING
    assert bcc_source.prologue(ours) == ""
    assert bcc_source.prepared(ours).splitlines()[0].count("probefleet_print_begin(const") == 1


@pytest.mark.parametrize("call", ["bpf_usdt_readarg(1, ctx, &x)", "bpf_usdt_readarg_p(2, ctx, &x, 8)"])
def test_a_text_that_reads_arguments_of_static_probes_is_given_the_maps_that_hold_them(call: str) -> None:
    source = f"int f(struct pt_regs *ctx) {{ u64 x = 0; {call}; return 0; }}\n"
    before = bcc_source.prologue(source)
    assert bcc_source.reads_usdt(source) and "BPF_ARRAY(__bpf_usdt_specs" in before and before.endswith("\n#line 1\n")
    assert bcc_source.written(before + source) == source.split("\n")
    assert not bcc_source.reads_usdt(f"/* {call} */ int x;") and bcc_source.prologue(f"// {call}\n") == ""


def test_structs_that_are_the_kernels_too_get_another_name() -> None:
    assert bcc_source.structs("struct a { int x; };\n// struct b {\nunion c {int y;};") == ("a", "c")
    assert bcc_source.prologue("int x;", ["a"]) == "#define a a__own\n#line 1\n"
    assert bcc_source.prologue("int x;") == ""
