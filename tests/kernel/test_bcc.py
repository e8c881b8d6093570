"""BCC's C, compiled locked in without kernel headers, loaded by our own gate, counting exactly."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

import pytest
from probefleet_agent.errors import NoSuchTarget, VerifierError
from probefleet_agent.kernel import bcc, links, syscall, verifier_log
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import MapType, ProgramType
from probefleet_wire import kept
from probefleet_wire.v1 import plan_pb2

pytestmark = pytest.mark.compiles
HEADERS = Path(f"/tmp/probefleet-test-headers-{os.getuid()}")
EXECS = """
#include <uapi/linux/ptrace.h>
#include <linux/sched.h>
BPF_HASH(by_uid, u32, u64);
TRACEPOINT_PROBE(syscalls, sys_enter_execve)
{
	u32 uid = bpf_get_current_uid_gid();
	by_uid.increment(uid);
	return 0;
}
"""


def compiled(source: str, **options: object) -> bcc.BccProgram:
    return bcc.compile(source, name="execs.c", headers_root=HEADERS, **options)  # type: ignore[arg-type]


def refused(source: str) -> str:
    with pytest.raises(bcc.CompileFailed) as caught:
        compiled(source)
    return str(caught.value)


def create(program: bcc.BccProgram, stack: contextlib.ExitStack) -> dict[str, Fd]:
    """Every map of a program, as the executor makes them."""
    btf = stack.enter_context(syscall.btf_load(program.btf_bytes))
    return {
        each.name: stack.enter_context(
            syscall.map_create(
                each.definition.type,
                key_size=each.definition.key_bytes,
                value_size=each.definition.value_bytes,
                max_entries=each.definition.max_entries,
                name=each.name,
                flags=each.definition.flags,
                btf_fd=btf if each.takes_btf else 0,
                btf_key_type_id=each.definition.key_type if each.takes_btf else 0,
                btf_value_type_id=each.definition.value_type if each.takes_btf else 0,
            )
        )
        for each in program.maps
    }


def test_execve_by_uid_counts_23_of_23() -> None:
    program = compiled(EXECS)
    (function,) = program.functions
    assert (function.hint.kind, function.hint.category, function.hint.target) == (
        "tracepoint",
        "syscalls",
        "sys_enter_execve",
    )
    with contextlib.ExitStack() as stack:
        fds = create(program, stack)
        loaded = stack.enter_context(
            syscall.prog_load(function.linked(fds), ProgramType.TRACEPOINT, licence=program.licence, name="execs")
        )
        attachment = plan_pb2.Attachment(
            program=function.name, tracepoint=plan_pb2.Tracepoint(category="syscalls", name="sys_enter_execve")
        )
        stack.callback(links.attach(loaded, attachment).close)
        # A uid of this test's own: the machine's other processes count elsewhere.
        uid = 64023
        for _ in range(23):
            # The child execs once; setpriv's own exec comes before it changes its uid.
            subprocess.run(["setpriv", f"--reuid={uid}", "--clear-groups", "/bin/true"], check=True)
        value = syscall.map_lookup(fds["by_uid"], uid.to_bytes(4, "little"), 8)
    assert value is not None
    assert int.from_bytes(value, "little") == 23


def test_every_kind_of_map_comes_through_with_its_layout() -> None:
    program = compiled("""
#include <uapi/linux/ptrace.h>
typedef u32 user_id_t;
struct key_t { user_id_t uid; char comm[16]; u64 cgroup; };
struct sent { u32 pid; char command[16]; u16 port; };
BPF_HASH(hashed, struct key_t, u64, 997);
BPF_TABLE("lru_hash", u32, u64, kept, 23);
BPF_ARRAY(slots, u64, 7);
BPF_PERCPU_ARRAY(percpu, u64, 4);
BPF_PERCPU_HASH(percpu_hashed, u32);
BPF_HISTOGRAM(distances);
BPF_STACK_TRACE(stacks, 1000);
BPF_PERF_OUTPUT(sends);
BPF_RINGBUF_OUTPUT(ring, 8);
BPF_PROG_ARRAY(jumps, 3);
int on_event(void *ctx)
{
	struct key_t key = {};
	struct sent sent = {};
	u32 number = 1;
	int slot = 1;
	u64 *found;

	key.uid = bpf_get_current_uid_gid();
	bpf_get_current_comm(&key.comm, sizeof(key.comm));
	hashed.increment(key);
	kept.increment(number);
	slots.increment(slot);
	percpu_hashed.increment(number);
	found = percpu.lookup(&slot);
	if (found)
		*found += 1;
	distances.increment(bpf_log2l(key.uid));
	stacks.get_stackid(ctx, 0);
	sends.perf_submit(ctx, &sent, sizeof(sent));
	ring.ringbuf_output(&sent, sizeof(sent), 0);
	jumps.call(ctx, 2);
	return 0;
}
""")
    maps = {each.name: each for each in program.maps}
    shapes = {
        name: (
            each.definition.type,
            each.definition.key_bytes,
            each.definition.value_bytes,
            each.definition.max_entries,
        )
        for name, each in maps.items()
    }
    cpus = len(os.listdir("/sys/bus/cpu/devices"))
    assert shapes == {
        "hashed": (MapType.HASH, 32, 8, 997),
        "kept": (MapType.LRU_HASH, 4, 8, 23),
        "slots": (MapType.ARRAY, 4, 8, 7),
        "percpu": (MapType.PERCPU_ARRAY, 4, 8, 4),
        "percpu_hashed": (MapType.PERCPU_HASH, 4, 8, 10240),
        "distances": (MapType.ARRAY, 4, 8, 64),
        "stacks": (MapType.STACK_TRACE, 4, 127 * 8, 1024),
        "sends": (MapType.PERF_EVENT_ARRAY, 4, 4, cpus),
        "ring": (MapType.RINGBUF, 0, 0, 8 * os.sysconf("SC_PAGESIZE")),
        "jumps": (MapType.PROG_ARRAY, 4, 4, 3),
    }
    key = {field.name: (field.offset_bytes, field.size_bytes, field.typedefs[:1]) for field in maps["hashed"].key}
    assert key == {"uid": (0, 4, ("user_id_t",)), "comm": (4, 16, ()), "cgroup": (24, 8, ("u64",))}
    for name in ("sends", "ring"):
        record = {field.name: (field.offset_bytes, field.size_bytes) for field in maps[name].record}
        assert record == {"pid": (0, 4), "command": (4, 16), "port": (20, 2)}
        assert maps[name].record_bytes == 24
    (function,) = program.functions
    assert {name for _, name in function.references} == set(shapes)
    assert function.hint.kind == ""
    with contextlib.ExitStack() as stack:
        fds = create(program, stack)
        stack.enter_context(
            syscall.prog_load(function.linked(fds), ProgramType.PERF_EVENT, licence=program.licence, name="on_event")
        )


LINES = """
#include <linux/sched.h>
#include <net/sock.h>
struct event { u32 pid; char comm[16]; };
BPF_HASH(counts, u32, u64);
BPF_PERF_OUTPUT(events);
#define ADD(value) \\
	do { (value) += 1; } while (0)

static inline u32 first(u32 key)
{
	return key ? key : bpf_get_prandom_u32();
}

int kprobe__tcp_sendmsg(struct pt_regs *ctx, struct sock *sk)
{
	u32 key = first(sk->__sk_common.skc_family);
	u64 *value = counts.lookup(&key); // lines of a comment; { }
	struct event event = {};

	event.pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(&event.comm, sizeof(event.comm));
	events.perf_submit(ctx, &event, sizeof(event));
	ADD(*value);
	return 0;
}

TRACEPOINT_PROBE(syscalls, sys_enter_execve)
{
	u32 key = 1;
	u64 *value = counts.lookup(&key);

	bpf_trace_printk("execve by %d\\n", key);
	*value += 1;
	return 0;
}
"""


@pytest.mark.parametrize(
    ("program", "kind", "line"),
    [
        ("kprobe__tcp_sendmsg", ProgramType.KPROBE, "ADD(*value);"),
        ("tracepoint__syscalls__sys_enter_execve", ProgramType.TRACEPOINT, "*value += 1;"),
    ],
)
def test_the_verifier_quotes_the_line_that_was_written(program: str, kind: ProgramType, line: str) -> None:
    """BCC puts lines of its own into both functions, and rewrites what each line calls."""
    found = compiled(LINES)
    number = LINES.splitlines().index(f"\t{line}") + 1
    (function,) = [each for each in found.functions if each.name == program]
    assert {function.line_of(index) for index in range(len(function.instructions) // 8)} <= {
        index for index, text in enumerate(LINES.splitlines(), 1) if text.strip()
    }
    with contextlib.ExitStack() as stack:
        fds = create(found, stack)
        btf = stack.enter_context(syscall.btf_load(found.btf_bytes))
        (functions, function_bytes), (lines, line_bytes) = function.function_records, function.line_records
        with pytest.raises(VerifierError) as caught:
            syscall.prog_load(
                function.linked(fds),
                kind,
                name="f",
                kernel_version=found.kernel_version,
                btf_fd=btf,
                func_info=functions,
                func_info_record_bytes=function_bytes,
                line_info=lines,
                line_info_record_bytes=line_bytes,
            )
    assert f"; {line}" in caught.value.log
    told = verifier_log.read(caught.value.log, lambda instruction: ("", function.line_of(instruction)))
    assert (told.line, told.source, told.plain) == (number, line, "value may be null")


def test_linking_only_changes_map_references() -> None:
    (function,) = compiled(EXECS).functions
    linked = function.linked({"by_uid": 77})
    different = {index // 8 for index, (a, b) in enumerate(zip(linked, function.instructions, strict=True)) if a != b}
    assert different == {instruction for instruction, _ in function.references}


def test_the_pod_filter_is_there_for_bcc_too() -> None:
    program = compiled("""
#include <probefleet.h>
BPF_HASH(counts, cgroup_id_t, u64);
RAW_TRACEPOINT_PROBE(sys_enter)
{
	cgroup_id_t cgroup = bpf_get_current_cgroup_id();
	if (!probefleet_selected(cgroup)) {
		probefleet_count_lost(PROBEFLEET_LOST_OTHER);
		return 0;
	}
	counts.increment(cgroup);
	return 0;
}
""")
    assert {each.name for each in program.maps} == {"counts", "probefleet_filter", "probefleet_lost"}
    counts = next(each for each in program.maps if each.name == "counts")
    assert counts.key[0].typedefs[0] == "cgroup_id_t"
    (function,) = program.functions
    assert (function.hint.kind, function.hint.target) == ("raw_tracepoint", "sys_enter")
    with contextlib.ExitStack() as stack:
        fds = create(program, stack)
        code = function.linked(fds)
        stack.enter_context(syscall.prog_load(code, ProgramType.RAW_TRACEPOINT, licence=program.licence, name="f"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "BPF_HASH(counts);\nint f(void *ctx)\n{\n\treturn missing;\n}\n",
            "execs.c:4:9: error: use of undeclared identifier 'missing'",
        ),
        ('\n#include "/etc/shadow"\n', "execs.c:2:10: error: #include of a host file: /etc/shadow is outside"),
        ("#include </proc/self/environ>\n", "execs.c:1:10: error: #include of a host file: /proc/self/environ"),
        (
            'int f(void *ctx)\n{\n\tasm volatile(".incbin \\"/etc/passwd\\"");\n\treturn 0;\n}\n',
            ".incbin of a host file",
        ),
        ("#include <probefleet.h>\nint f(void *ctx) { return nothing; }\n", "execs.c:2:"),
    ],
)
def test_mistakes_have_the_policys_lines_and_no_file_of_the_host(source: str, words: str) -> None:
    text = refused(source)
    assert words in text
    assert "root:" not in text


def test_a_tracepoint_that_does_not_exist_has_near_names() -> None:
    with pytest.raises(NoSuchTarget, match=r"no tracepoint syscalls:sys_enter_exevce.*near: sys_enter_execve"):
        compiled(EXECS.replace("sys_enter_execve", "sys_enter_exevce"))


def test_an_endless_compile_is_stopped() -> None:
    lines = ["#define A0 x+x+x+x+x+x+x+x+x+x"]
    lines += [f"#define A{n} " + "+".join([f"A{n - 1}"] * 10) for n in range(1, 10)]
    with pytest.raises(bcc.CompileFailed, match="and was stopped"):
        compiled("\n".join(lines) + "\nint f(int x) { return A9; }\n", timeout_seconds=5)


def test_a_record_struct_that_the_preprocessor_leaves_out_does_no_harm() -> None:
    program = compiled("""
#if 0
struct never { int a; };
#endif
struct sent { u32 pid; };
BPF_PERF_OUTPUT(sends);
int f(void *ctx)
{
	struct sent sent = {};
	return sends.perf_submit(ctx, &sent, sizeof(sent));
}
""")
    assert [each.name for each in program.maps] == ["sends"]


def test_the_parent_stays_small() -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    # The kernel's types are some megabytes, read each time: glibc keeps such room from the second time on.
    for _ in range(2):
        compiled(EXECS)
    before = resident()
    program = compiled(EXECS + "// again\n")
    assert resident() - before < 5 << 10  # KiB
    assert program.peak_bytes > 50 << 20  # LLVM was somewhere else


def test_what_came_of_a_source_is_kept_by_all_that_it_depends_on() -> None:
    known: bcc.Known = kept.Kept(8 << 20)
    first = compiled(EXECS, known=known)
    begun = time.monotonic()
    assert compiled(EXECS, known=known) is first
    took_seconds = time.monotonic() - begun
    assert (known.hits, known.misses) == (1, 1)
    assert took_seconds < first.seconds / 2, "no compiler was started"
    other = bcc.compile(EXECS, name="other.c", headers_root=HEADERS, known=known)
    assert other is not first and (known.hits, known.misses) == (1, 2)
    for _ in range(2):
        with pytest.raises(bcc.CompileFailed, match=r"execs.c:1:\d+: error"):
            compiled("int f(void *ctx) { return nobody; }", known=known)
    assert (known.hits, known.misses) == (2, 3)
    assert first.size_bytes < known.size_bytes < 1 << 20


def test_a_source_that_took_too_long_may_compile_at_another_time() -> None:
    known: bcc.Known = kept.Kept(8 << 20)
    with pytest.raises(bcc.CompileFailed, match="took more than"):
        compiled(EXECS, known=known, timeout_seconds=0.05)
    assert compiled(EXECS, known=known).functions
    assert (known.hits, known.misses) == (0, 2)
