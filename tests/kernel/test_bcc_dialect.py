"""What programs written for BCC with kernel headers take for granted: macros, inline functions, own structs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from probefleet_agent.kernel import bcc, maps, syscall
from probefleet_wire import map_types

from tests.kernel import examples_runner, policies
from tests.kernel.support import call_getppid

HEADERS = Path(f"/tmp/probefleet-test-headers-{os.getuid()}")
STACKS = """
apiVersion: probefleet.io/v1alpha1
kind: ProbePolicy
metadata: {name: stacks}
spec:
  scope: Cluster
  program:
    bcc:
      source: |
        BPF_STACK_TRACE(traces, 1024);
        BPF_HASH(counts, int);
        RAW_TRACEPOINT_PROBE(sched_switch)
        {
            int stack = traces.get_stackid(ctx, 0);
            counts.increment(stack);
            return 0;
        }
"""


def compiled(source: str) -> bcc.BccProgram:
    return bcc.compile(source, name="dialect.c", headers_root=HEADERS)


def test_members_of_sockets_have_their_old_names() -> None:
    program = compiled("""
#include <net/sock.h>
#include <net/inet_sock.h>
BPF_HASH(ports, u16);
int on_send(struct pt_regs *ctx, struct sock *sk)
{
	struct inet_sock *inet = inet_sk(sk);
	u16 port = ntohs(inet->inet_dport);
	if (sk->sk_family == AF_INET && sk->sk_state == TCP_ESTABLISHED)
		ports.increment(port);
	return 0;
}
""")
    (function,) = program.functions
    assert not calls_nothing(function.instructions)


def calls_nothing(code: bytes) -> bool:
    """There is a call of a function that is not there: source register 1, and -1 for an address."""
    rows = [code[at : at + 8] for at in range(0, len(code), 8)]
    return any(row[0] == 0x85 and row[1] >> 4 == 1 and row[4:] == b"\xff\xff\xff\xff" for row in rows)


def test_a_function_that_is_not_there_is_named() -> None:
    with pytest.raises(bcc.CompileFailed, match=r"dialect\.c:3:\d+: error: .*no_such_function"):
        compiled("int f(void *ctx)\n{\n\treturn no_such_function(1);\n}\n")


def test_a_struct_of_the_programs_own_may_have_the_kernels_name() -> None:
    # fs/namei.c keeps this one to itself, so programs bring their own; BTF has it all the same.
    program = compiled("""
struct nameidata { u64 only; };
BPF_HASH(seen, struct nameidata);
int f(struct pt_regs *ctx)
{
	struct nameidata key = {.only = 7};
	seen.increment(key);
	return 0;
}
""")
    (table,) = program.maps
    assert [(field.name, field.size_bytes) for field in table.key] == [("only", 8)]


def test_a_table_of_stacks_is_made(tmp_path: Path) -> None:
    path = tmp_path / "stacks.yaml"
    path.write_text(STACKS)
    with examples_runner.running(path, links=1) as run:
        pass
    assert sum(run.rows("stacks", "counts").values()) > 0


def test_a_record_is_described_though_the_preprocessor_leaves_another_struct_out() -> None:
    program = compiled("""
#ifdef NEVER
struct never { int a; };
#endif
struct sent { u32 pid; char comm[16]; };
BPF_PERF_OUTPUT(sends);
int f(void *ctx)
{
	struct sent sent = {};
	return sends.perf_submit(ctx, &sent, sizeof(sent));
}
""")
    (sends,) = program.maps
    assert [field.name for field in sends.record] == ["pid", "comm"]


def test_a_record_with_a_union_that_has_no_name_is_described_by_all_its_readings() -> None:
    program = compiled("""
struct sent {
	u32 kind;
	union {
		struct { u32 pid; char comm[16]; } enter;
		char path[64];
		int result;
	};
};
BPF_PERF_OUTPUT(sends);
int f(void *ctx)
{
	struct sent sent = {};
	return sends.perf_submit(ctx, &sent, sizeof(sent));
}
""")
    (sends,) = program.maps
    names = {field.name: field.offset_bytes for field in sends.record}
    assert names == {"kind": 0, "enter.pid": 4, "enter.comm": 8, "path": 4, "result": 4}
    assert sends.record_bytes == 68


def test_inline_functions_of_kernel_headers_that_btf_cannot_give() -> None:
    compiled("""
#include <linux/skbuff.h>
#include <linux/scatterlist.h>
int f(struct pt_regs *ctx, struct sk_buff *given, struct scatterlist *list)
{
	struct sk_buff skb; struct scatterlist sg;
	bpf_probe_read_kernel(&skb, sizeof(skb), given);
	bpf_probe_read_kernel(&sg, sizeof(sg), list);
	if (sg_is_chain(&sg) || sg_is_last(&sg) || !sg_chain_ptr(&sg))
		return 0;
	return skb_rx_queue_recorded(&skb) ? skb_get_rx_queue(&skb) : 0;
}
""")


def by_bcc(declared: str, body: str, **spec: Any) -> policies.Manifest:
    """A policy that runs this at each getppid of this process."""
    made = policies.c_policy("", **spec)
    source = f"""
{declared}
TRACEPOINT_PROBE(syscalls, sys_enter_getppid)
{{
    if (bpf_get_current_pid_tgid() >> 32 != {os.getpid()})
        return 0;
    {body}
    return 0;
}}
"""
    made["spec"]["program"] = {"bcc": {"source": source}}
    return made


@pytest.mark.parametrize("kind", ["QUEUE", "STACK"])
def test_queues_and_stacks_are_drained_with_what_they_hold(kind: str) -> None:
    outputs = [{"name": "notes", "from": {"map": "notes"}, "events": {}}]
    declared = f"struct note {{ u64 number; u32 pid; }}; BPF_{kind}(notes, struct note, 4096);"
    body = f"struct note note = {{ .number = 7, .pid = {os.getpid()} }}; notes.push(&note, 0);"
    with policies.run(by_bcc(declared, body, outputs=outputs)) as run:
        call_getppid(997)
        events = run.output("notes")["events"]
    assert events["received"] == 997
    assert {(each["number"], each["pid"]) for each in events["records"]} == {("7", str(os.getpid()))}


def test_a_trie_is_an_output_by_its_prefixes() -> None:
    declared = "struct prefix { u32 prefixlen; u32 address; }; BPF_LPM_TRIE(nets, struct prefix, u64, 16);"
    body = """
    struct prefix net = { .prefixlen = 8, .address = 10 }, host = { .prefixlen = 32, .address = 0x0302010a };
    u64 zero = 0, *count;
    nets.lookup_or_try_init(&net, &zero);
    count = nets.lookup(&host);
    if (count)
        __sync_fetch_and_add(count, 1);
"""
    with policies.run(by_bcc(declared, body)) as run:
        call_getppid(997)
        assert run.rows("nets") == {("10.0.0.0/8",): 997}


@pytest.mark.parametrize(
    "outer", ['BPF_ARRAY_OF_MAPS(outer, "inner", 4);', 'BPF_HASH_OF_MAPS(outer, int, "inner", 4);']
)
def test_maps_of_maps_are_made_in_the_likeness_of_their_inner_one(outer: str) -> None:
    declared = f"BPF_ARRAY(inner, u64, 4); {outer} BPF_ARRAY(counts, u64, 2);"
    body = "int zero = 0; void *found = outer.lookup(&zero); int key = found ? 1 : 0; counts.atomic_increment(key);"
    outputs = [{"name": "counts", "from": {"map": "counts"}, "topk": {}, "groupBy": ["key"]}]
    with policies.run(by_bcc(declared, body, outputs=outputs)) as run:
        call_getppid(23)
        assert run.rows("counts") == {("0",): 23}, "nobody has put one there"
        (pin,) = policies.folder().glob("probefleet/instances/*/map_outer")
        with syscall.obj_get(str(pin)) as fd:
            assert maps.info(fd).type in map_types.OUTER


def test_a_stack_by_build_ids_is_named() -> None:
    declared = """
typedef u32 pid_nr_t;
typedef int user_stack_id_t;
struct where { pid_nr_t process; user_stack_id_t user; };
BPF_HASH(calls, struct where);
BPF_STACK_TRACE_BUILDID(users, 64);
"""
    body = f"""
    struct where key = {{ .process = {os.getpid()} }};
    key.user = users.get_stackid(args, BPF_F_USER_STACK);
    calls.increment(key);
"""
    outputs = [{"name": "calls", "from": {"map": "calls"}, "stacks": {}, "groupBy": []}]
    with policies.run(by_bcc(declared, body, outputs=outputs)) as run:
        call_getppid(23)
        (row,) = run.output("calls")["total"]["rows"]
    assert row["value"] == 23 and "getppid" in row["key"][-1].rpartition(";")[2]
