"""Objects from memory: settings before load, descriptors after it, refusals with the C line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from probefleet_agent.errors import KernelError, NoSuchTarget, ObjectError, VerifierError
from probefleet_agent.kernel import libbpf, links, maps, syscall
from probefleet_agent.kernel.uapi import AttachType, MapType, ProgramType

from tests.kernel.support import PRELUDE, Loaded, attachment, call_getppid, compile_object

PRELUDE_LINES = PRELUDE.count("\n")
TWO = """
const volatile u64 threshold = 5;
struct event { u64 a; u32 b; };
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); __type(value, struct event); }
ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, u32); __type(value, u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME); } counts SEC(".maps");
SEC("tracepoint/syscalls/sys_enter_getppid")
int by_tracepoint(void *ctx)
{
	u32 key = 7;
	u64 value = threshold;
	if (ours())
		bpf_map_update_elem(&counts, &key, &value, BPF_ANY);
	return 0;
}
SEC("tp_btf/no_such_tracepoint")
int by_tp_btf(void *ctx)
{
	return 0;
}
"""


def test_an_object_says_what_is_in_it() -> None:
    with libbpf.open_object(compile_object(TWO), "two") as opened:
        assert set(opened.map_names) == {"hits", "ring", "counts"}
        assert opened.program_names == ("by_tracepoint", "by_tp_btf")
        assert opened.section("by_tp_btf") == "tp_btf/no_such_tracepoint"
        assert opened.program_type("by_tp_btf") == (ProgramType.TRACING, AttachType.TRACE_RAW_TP)
        assert opened.max_entries("counts") == 64


def test_settings_take_effect() -> None:
    target = attachment("by_tracepoint", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})
    with libbpf.open_object(compile_object(TWO), "two") as opened:
        opened.set_rodata("threshold", (997).to_bytes(8, "little"))
        opened.set_rodata("target_pid", os.getpid().to_bytes(4, "little"))
        opened.set_max_entries("counts", 23)
        opened.set_autoload("by_tp_btf", False)
        opened.load()
        counts, ring, program = opened.map_fd("counts"), opened.map_fd("ring"), opened.program_fd("by_tracepoint")
        with pytest.raises(ObjectError, match="not loaded"):
            opened.program_fd("by_tp_btf")
    # libbpf's side is gone; ours lives.
    with counts, ring, program, links.attach(program, target):
        call_getppid(1)
        assert syscall.map_info(counts).max_entries == 23
        assert syscall.map_info(ring).value_size == 0, "a ring's __type(value) is only a description"
        value = syscall.map_lookup(counts, (7).to_bytes(4, "little"), 8)
        assert value == (997).to_bytes(8, "little")
    assert not Path("/sys/fs/bpf/counts").exists(), "nothing is pinned by name"


def test_a_tp_btf_program_can_be_given_another_tracepoint() -> None:
    with libbpf.open_object(compile_object(TWO), "two") as opened:
        opened.set_attach_target("by_tp_btf", "sys_enter")
        opened.load()
        with opened.program_fd("by_tp_btf") as program:
            assert syscall.program_info(program).type == ProgramType.TRACING


def test_a_tp_btf_tracepoint_that_is_not_there_is_no_verifiers_matter() -> None:
    source = TWO.replace("no_such_tracepoint", "sched_swich")
    with (
        libbpf.open_object(compile_object(source), "two") as opened,
        pytest.raises(NoSuchTarget, match=r"no tp_btf tracepoint sched_swich .*near: sched_switch"),
    ):
        opened.load()


def test_a_map_of_another_owner_takes_the_place_of_ones_own() -> None:
    with (
        syscall.map_create(MapType.HASH, key_size=4, value_size=8, max_entries=128, name="shared") as shared,
        libbpf.open_object(compile_object(TWO), "two") as opened,
    ):
        opened.set_autoload("by_tp_btf", False)
        opened.reuse_map("counts", shared)
        opened.load()
        with opened.map_fd("counts") as fd, opened.program_fd("by_tracepoint") as program:
            assert maps.info(fd).id == maps.info(shared).id
            assert maps.info(shared).id in syscall.program_info(program).map_ids


def test_a_program_without_a_kind_is_given_one() -> None:
    source = 'SEC("somewhere") int on_it(void *ctx) { return ours() ? hit() : 0; }'
    with Loaded(source, on_it=(ProgramType.RAW_TRACEPOINT, 0)) as loaded:
        assert syscall.program_info(loaded.programs["on_it"]).type == ProgramType.RAW_TRACEPOINT


def test_what_is_not_there_is_named_with_what_is() -> None:
    with libbpf.open_object(compile_object(TWO), "two") as opened:
        with pytest.raises(ObjectError, match=r"two has no map 'count'; there is: .*counts"):
            opened.set_max_entries("count", 1)
        with pytest.raises(ObjectError, match="two has no program 'x'; there is: by_tracepoint, by_tp_btf"):
            opened.section("x")
        with pytest.raises(ObjectError, match=r"no variable 'treshold'; there is: .*threshold"):
            opened.set_rodata("treshold", bytes(8))
        with pytest.raises(ObjectError, match="threshold has 8 bytes, the value 4"):
            opened.set_rodata("threshold", bytes(4))
        with pytest.raises(ObjectError, match="not loaded"):
            opened.map_fd("counts")


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x7fELF" + bytes(60)])
def test_what_is_no_object_is_refused_quietly(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(ObjectError, match="bad is not a BPF object that libbpf can open"),
        libbpf.open_object(data, "bad"),
    ):
        pass
    assert capfd.readouterr() == ("", ""), "libbpf never writes to our stderr"


REFUSED = {
    "null pointer": (
        "u32 k = 9; u64 *v = bpf_map_lookup_elem(&h, &k);\n*v += 1;\nreturn 0;",
        "verifier refused on_it at line {1}: v may be null. Test the pointer first.",
    ),
    "member of a null pointer": (
        "u32 k = 9; struct pair *p = bpf_map_lookup_elem(&pairs, &k);\np->a = 1;\nreturn 0;",
        "verifier refused on_it at line {1}: p may be null. Test the pointer first.",
    ),
    "no bounds": (
        "u32 k = 0; struct many *m = bpf_map_lookup_elem(&table, &k); if (!m) return 0;\n"
        "u64 i = bpf_get_prandom_u32();\nm->a[i] = 1;\nreturn 0;",
        "verifier refused on_it at line {2}: ",
    ),
    "off by one": (
        "u32 k = 0; struct many *m = bpf_map_lookup_elem(&table, &k); if (!m) return 0;\n"
        "u64 i = bpf_get_prandom_u32();\nif (i > 16) return 0;\nm->a[i] = 1;\nreturn 0;",
        "verifier refused on_it at line {3}: an access can go beyond the end \\(8 bytes at 128 of a value of 128\\)",
    ),
    "kernel memory by a plain number": (
        "u64 a = bpf_get_current_task();\nreturn *(u32 *)(a + 16);",
        "BPF_CORE_READ()",
    ),
    "no end": (
        "volatile u64 x = bpf_get_prandom_u32();\nwhile (x != 1) x = bpf_get_prandom_u32();\nreturn 0;",
        "a loop has no end|too many instructions",
    ),
    "a record not given back": (
        "u64 *r = bpf_ringbuf_reserve(&ring, 8, 0);\nif (!r) return 0;\nif (bpf_get_prandom_u32() == 5) return 0;\n"
        "bpf_ringbuf_submit(r, 0);\nreturn 0;",
        "a record or reference that was taken is not given back",
    ),
    "a wrong helper": (
        "return bpf_xdp_adjust_head(ctx, 8);",
        r"bpf_xdp_adjust_head\(\) is not allowed in a program of this type",
    ),
}
DECLARATIONS = """
struct pair { u64 a; u64 b; };
struct many { u64 a[16]; };
#define MAP(t, n, k, v, name) \\
	struct { __uint(type, t); __uint(max_entries, n); __type(key, k); __type(value, v); } name SEC(".maps")
MAP(BPF_MAP_TYPE_HASH, 8, u32, u64, h);
MAP(BPF_MAP_TYPE_HASH, 8, u32, struct pair, pairs);
MAP(BPF_MAP_TYPE_HASH, 8, struct pair, struct pair, by_pair);
MAP(BPF_MAP_TYPE_ARRAY, 1, u32, struct many, table);
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); } ring SEC(".maps");
"""


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_line_and_advice(name: str) -> None:
    body, wanted = REFUSED[name]
    source = f'{DECLARATIONS}SEC("raw_tracepoint/sys_enter")\nint on_it(void *ctx)\n{{\n{body}\n}}\n'
    first = PRELUDE_LINES + source[: source.index(body)].count("\n") + 1
    for offset in range(5):
        wanted = wanted.replace("{%d}" % offset, str(first + offset))  # noqa: UP031
    with (
        pytest.raises(VerifierError, match=wanted) as caught,
        libbpf.open_object(compile_object(source), "refused") as opened,
    ):
        opened.load()
    assert caught.value.program == "on_it"
    assert len(caught.value.tail.encode()) <= 4096 and caught.value.tail in caught.value.log
    assert caught.value.instructions > 0


def test_a_program_that_is_not_gpl_hears_of_its_licence() -> None:
    source = compile_object(
        '#include "vmlinux.h"\n#include <bpf/bpf_helpers.h>\nchar L[] SEC("license") = "Proprietary";\n'
        'SEC("raw_tracepoint/sys_enter") int on_it(void *ctx) { return bpf_ktime_get_ns() & bpf_get_current_task(); }',
        False,
    )
    with (
        pytest.raises(VerifierError, match="only for programs under the GPL"),
        libbpf.open_object(source, "p") as opened,
    ):
        opened.load()


def test_a_field_that_this_kernel_lacks_is_named() -> None:
    source = """
    struct task_struct___other { int no_such_field; } __attribute__((preserve_access_index));
    SEC("raw_tracepoint/sys_enter") int on_it(void *ctx)
    {
        struct task_struct___other *task = (void *)bpf_get_current_task();
        return BPF_CORE_READ(task, no_such_field);
    }
    """
    with (
        pytest.raises(VerifierError, match=r"task_struct.*no_such_field is not in this kernel"),
        libbpf.open_object(compile_object(source), "p") as opened,
    ):
        opened.load()


def test_an_impossible_map_is_a_kernel_error_in_libbpfs_words() -> None:
    with libbpf.open_object(compile_object(TWO), "two") as opened:
        opened.set_autoload("by_tp_btf", False)
        opened.set_max_entries("ring", 12345)
        # libbpf rounds a ring's size up by itself; a hash of no entries it does not.
        opened.set_max_entries("counts", 0)
        with pytest.raises(KernelError, match="counts"):
            opened.load()


def test_the_library_says_its_version() -> None:
    assert (1, 0) <= libbpf.version() < (2, 0)
