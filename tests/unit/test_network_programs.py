"""Network programs change nothing: their verdict is fixed in the object, and what might write is found."""

from __future__ import annotations

import pytest
from probefleet_wire import bpf_code, network_programs, verdicts
from probefleet_wire.bpf_code import EXIT
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.network_programs import CGROUP_SKB, CGROUP_SOCK, SOCKET_FILTER, TC, XDP, Kind

from tests import bpf_c

PRELUDE = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
char LICENSE[] SEC("license") = "GPL";
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 8); __type(key, u32); __type(value, u64); }
counts SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 4); __type(key, u32); __type(value, u32); }
slots SEC(".maps");
static __always_inline void count(u32 key)
{
	u64 *value = bpf_map_lookup_elem(&counts, &key);
	if (value)
		__sync_fetch_and_add(value, 1);
}
"""
COUNTS = """
SEC("xdp") int counts_all(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;

	if (data + sizeof(*eth) > end)
		return XDP_ABORTED;
	count(bpf_ntohs(eth->h_proto) == 0x0800);
	return XDP_PASS;
}
"""
DECIDES = """
SEC("xdp") int first(struct xdp_md *ctx)
{
	u32 key = ctx->ingress_ifindex & 7;
	u64 *value = bpf_map_lookup_elem(&counts, &key);

	return value ? *value : XDP_DROP;
}
SEC("xdp") int second(struct xdp_md *ctx)
{
	bpf_tail_call(ctx, &slots, ctx->rx_queue_index & 3);
	count(3);
	return bpf_get_prandom_u32();
}
SEC("tc") int third(struct __sk_buff *skb)
{
	return skb->len & 3;
}
"""


def compiled(source: str, cpu: str = "v3") -> bytes:
    return bpf_c.compiled(PRELUDE + source, cpu=cpu)


def objections(source: str, kind: Kind = XDP, program: str = "it", cpu: str = "v3") -> list[str]:
    code = bpf_code.read(compiled(source, cpu))
    return [each.what for each in network_programs.objections(code, program, kind, verdict_is_fixed=False)]


def test_a_fixed_program_returns_one_verdict_on_every_way() -> None:
    wanted = {"first": 2, "second": 2, "third": -1}
    data = compiled(DECIDES)
    before = bpf_code.read(data)
    assert not any(verdicts.pass_proved(before, name, verdict) for name, verdict in wanted.items())
    made = verdicts.fixed(data, wanted)
    after = bpf_code.read(made)
    for name, verdict in wanted.items():
        assert verdicts.pass_proved(after, name, verdict), name
        old, new = before.functions[before.programs[name]], after.functions[after.programs[name]]
        assert len(new.instructions) == len(old.instructions) + 2
        assert [it for it in old.instructions if it.code != EXIT] == [
            it for it, was in zip(new.instructions, old.instructions, strict=False) if was.code != EXIT
        ], "nothing else changes"
        assert old.filled.keys() == new.filled.keys(), "relocations move with what they fill"
    assert verdicts.fixed(made, wanted) == made, "what is proved stays as it is"


def test_what_is_known_of_the_source_stays_true() -> None:
    data = compiled(DECIDES)
    old, new = BpfObject.parse(data), BpfObject.parse(verdicts.fixed(data, {"first": 2, "second": 2, "third": -1}))
    assert [each.name for each in old.programs] == [each.name for each in new.programs]
    for program in old.programs:
        for number in range(program.instruction_count):
            assert old.line_of(program.name, number) == new.line_of(program.name, number)
    assert old.maps == new.maps


def test_only_the_programs_named_are_changed() -> None:
    data = compiled(DECIDES)
    after = bpf_code.read(verdicts.fixed(data, {"second": 2}))
    assert [verdicts.pass_proved(after, name, 2) for name in ("first", "second")] == [False, True]


def test_a_jump_onto_an_exit_is_no_proof() -> None:
    """`if r1 == 0 goto exit` would leave with whatever is in r0."""
    source = """
    SEC("xdp") __attribute__((naked)) int it(struct xdp_md *ctx)
    {
        asm volatile("r0 = 1; if r1 == 0 goto 1f; r0 = 2; 1: exit;");
    }
    """
    assert not verdicts.pass_proved(bpf_code.read(compiled(source)), "it", 2)


def test_a_program_that_only_counts_has_nothing_against_it() -> None:
    assert objections(COUNTS, program="counts_all") == []
    assert objections(DECIDES, program="first") == objections(DECIDES, program="second") == []


PACKET = "void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;"
WRITES = {
    "a byte": f"{PACKET} if (data + 1 > end) return 2; *(u8 *)data = 1;",
    "behind a length": f"{PACKET} u32 n = bpf_get_prandom_u32() & 15; if (data + n + 4 > end) return 2;"
    " *(volatile u32 *)(data + n) = 7;",
    "from the end": f"{PACKET} if (end - 4 < data) return 2; *(volatile u32 *)(end - 4) = 7;",
    "in a loop": f"{PACKET} for (int i = 0; i < 8; i++)"
    " { if (data + i + 1 > end) break; ((volatile u8 *)data)[i] = i; }",
    "either of two": f"{PACKET} u32 key = 0; u64 *v = bpf_map_lookup_elem(&counts, &key);"
    " if (!v || data + 8 > end) return 2; volatile u64 *to = *v ? v : data; *to = 1;",
}


@pytest.mark.parametrize("body", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("cpu", ["v1", "v3"])
def test_a_write_into_the_packet_is_found(body: str, cpu: str) -> None:
    found = objections(f'SEC("xdp") int it(struct xdp_md *ctx) {{ {body} return 2; }}', cpu=cpu)
    assert found and set(found) == {"it may write into the packet"}


def test_a_write_in_a_function_that_gets_the_packet_is_found() -> None:
    source = f"""
    static __noinline int scribble(u8 *at) {{ if (at) *(volatile u8 *)at = 1; return 0; }}
    SEC("xdp") int it(struct xdp_md *ctx) {{ {PACKET} if (data + 1 > end) return 2; return scribble(data); }}
    """
    assert objections(source) == ["it may write into the packet"]


def test_a_write_through_a_pointer_that_lay_on_the_stack_is_found() -> None:
    source = f"""
    static __noinline int scribble(void **slot) {{ if (slot) *(volatile u8 *)*slot = 1; return 0; }}
    SEC("xdp") int it(struct xdp_md *ctx)
    {{ {PACKET} void *slot[1] = {{data}}; if (data + 1 > end) return 2; return scribble(slot); }}
    """
    assert objections(source) == ["it may write into the packet"]


def test_a_write_in_a_callback_is_found() -> None:
    source = f"""
    struct seen {{ u8 *at; void *end; }};
    static long each(u32 i, struct seen *seen)
    {{ if (seen->at + 1 > (u8 *)seen->end) return 1; *seen->at = 1; return 0; }}
    SEC("xdp") int it(struct xdp_md *ctx)
    {{ {PACKET} struct seen seen = {{data, end}}; bpf_loop(4, each, &seen, 0); return 2; }}
    """
    assert objections(source) == ["it may write into the packet"]


def test_a_field_found_by_co_re_is_judged_by_its_name() -> None:
    """A struct of one's own can have any offset in the file: the loader puts the kernel's there."""
    source = """
    struct xdp_md___mine { u32 pad; u32 more; u32 again; u32 data; } __attribute__((preserve_access_index));
    SEC("xdp") int it(struct xdp_md___mine *ctx)
    {
        void *data = (void *)(long)ctx->data;
        *(volatile u8 *)data = 1;
        return 2;
    }
    """
    assert objections(source) == ["it may write into the packet"]


def test_a_write_into_the_context_is_found() -> None:
    source = 'SEC("tc") int it(struct __sk_buff *skb) { skb->mark = 7; return 0; }'
    assert objections(source, TC) == objections(source, CGROUP_SKB) == ["it may write into its context"]
    source = 'SEC("cgroup/sock_create") int it(struct bpf_sock *ctx) { ctx->mark = 7; return 1; }'
    assert objections(source, CGROUP_SOCK) == ["it may write into its context"]


STORES = {
    "a record": "u32 *r = bpf_ringbuf_reserve(&ring, 8, 0); if (!r) return 2; r[0] = *(u8 *)data; r[1] = end - data;"
    " bpf_ringbuf_submit(r, 0);",
    "the stack": "u64 sizes[4] = {}; sizes[(end - data) & 3] = 1; bpf_map_update_elem(&counts, &sizes, &sizes, 0);",
    "a map's value": "u32 key = (end - data) >> 8 & 7; u64 *v = bpf_map_lookup_elem(&counts, &key);"
    " if (v) *v += end - data;",
    "a variable": "last = *(u8 *)data; lengths[(end - data) & 7] += 1;",
}


@pytest.mark.parametrize("body", STORES.values(), ids=STORES.keys())
@pytest.mark.parametrize("cpu", ["v1", "v3"])
def test_what_is_stored_elsewhere_is_no_write(body: str, cpu: str) -> None:
    source = f"""
    struct {{ __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); }} ring SEC(".maps");
    u64 last; u64 lengths[8];
    SEC("xdp") int it(struct xdp_md *ctx) {{ {PACKET} if (data + 1 > end) return 1; {body} return 2; }}
    """
    assert objections(source, cpu=cpu) == []


def test_helpers_that_change_or_send_packets_are_refused_by_number() -> None:
    source = 'SEC("xdp") int it(struct xdp_md *ctx) { return bpf_xdp_adjust_head(ctx, 4); }'
    assert objections(source) == ["it calls bpf_xdp_adjust_head"]
    source = 'SEC("tc") int it(struct __sk_buff *skb) { bpf_clone_redirect(skb, 1, 0); return bpf_redirect(1, 0); }'
    assert objections(source, TC) == ["it calls bpf_clone_redirect", "it calls bpf_redirect"]
    source = """
    extern int bpf_dynptr_from_xdp(struct xdp_md *x, u64 flags, struct bpf_dynptr *ptr) __ksym;
    SEC("xdp") int it(struct xdp_md *ctx) { struct bpf_dynptr p; return bpf_dynptr_from_xdp(ctx, 0, &p); }
    """
    assert "it calls bpf_dynptr_from_xdp" in objections(source)


def test_reads_that_end_a_program_are_refused_where_their_answer_is_a_verdict() -> None:
    source = """
    unsigned long long load_byte(void *skb, unsigned long long off) asm("llvm.bpf.load.byte");
    SEC("tc") int it(struct __sk_buff *skb) { count(load_byte(skb, 12)); return 0; }
    """
    (found,) = objections(source, TC)
    assert "LD_ABS" in found
    assert objections(source, SOCKET_FILTER) == []
