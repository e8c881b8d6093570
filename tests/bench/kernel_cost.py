"""What a counted system call costs in the kernel, ours against BCC's: ``python tests/bench/kernel_cost.py``, as root.

Five programs on raw sys_enter, one after the other, by the kernel's own statistics (nanoseconds a run), while one
process makes one system call again and again. The least of some rounds counts. Compared are

    empty           returns at once: what the statistics show for nothing; it is taken off the others for the ratios
    bcc             ``BPF_HASH`` keyed by system call, ``increment()``: as BCC's tools count
    dense           a C program of ours for the same: a per-CPU array, counted in place
    bcc, container  ``BPF_HASH`` keyed by cgroup and system call
    syscount        the catalog's, without latency: the same, told apart from 32-bit calls, behind the filter

The goals are half of BCC's for a dense key (``dense``), and 0.85 of it for a hashed one (``syscount``).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from probefleet_agent import bcc_programs
from probefleet_agent.kernel import libbpf, links, syscall
from probefleet_wire.v1 import plan_pb2

from tests.kernel.catalog_probe import the_catalog, wire
from tests.kernel.support import compile_object

CALLS, ROUNDS = 50_000, 15
EMPTY = 'SEC("raw_tp/sys_enter") int on_enter(void *ctx) { return 0; }'
DENSE = """
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1024); __type(key, u32); __type(value, u64); }
counts SEC(".maps");
SEC("raw_tp/sys_enter")
int on_enter(struct bpf_raw_tracepoint_args *ctx)
{
	u32 number = ctx->args[1];
	u64 *count = bpf_map_lookup_elem(&counts, &number);
	if (count)
		*count += 1;
	return 0;
}
"""
BCC_CONTAINER = """
struct call { u64 cgroup; u32 number; u32 zero; };
BPF_HASH(counts, struct call);
RAW_TRACEPOINT_PROBE(sys_enter)
{
	struct call call = { bpf_get_current_cgroup_id(), ctx->args[1], 0 };
	counts.increment(call);
	return 0;
}
"""
BCC = """
BPF_HASH(counts, u32);
RAW_TRACEPOINT_PROBE(sys_enter)
{
	u32 number = ctx->args[1];
	counts.increment(number);
	return 0;
}
"""


def least_ns(program: int) -> float:
    """Nanoseconds a run, in the quietest of some rounds."""
    call = ctypes.CDLL(None).sched_get_priority_max
    best = float("inf")
    with syscall.enable_stats():
        for _ in range(ROUNDS):
            before = syscall.program_info(program)
            for _ in range(CALLS):
                call(0)
            after = syscall.program_info(program)
            best = min(best, (after.run_time_ns - before.run_time_ns) / (after.run_count - before.run_count))
    return best


def of_object(source: str) -> float:
    """An object compiled from C."""
    with libbpf.open_object(compile_object(source), "bench") as opened:
        opened.load()
        with opened.program_fd("on_enter") as program:
            target = plan_pb2.Attachment(program="on_enter")
            target.raw_tracepoint.name = "sys_enter"
            with links.attach(program, target):
                return least_ns(int(program))


def of_bcc(source: str) -> float:
    """BCC's compiler, in the child that the agent runs it in."""
    instance = plan_pb2.Instance(title="bench", digest="bench")
    instance.bcc.source, instance.bcc.file_name = source, "bench.c"
    loaded = bcc_programs.load(instance, {}, 0, "")
    try:
        (attachment,), (program,) = loaded.chosen, loaded.programs.values()
        with links.attach(program, attachment):
            return least_ns(int(program))
    finally:
        loaded.close()


def of_syscount() -> float:
    """The catalog's probe as the agent loads it; its program for sys_enter."""
    found = the_catalog().get("syscount")
    assert found is not None
    with libbpf.open_object(found.elf, "syscount") as opened:
        for variable, value in found.variables((("latency", "false"),)).items():
            opened.set_rodata(variable, value)
        opened.load()
        name = next(each.program for each in found.attachments() if each.program == "sys_enter_btf")
        attachment = next(wire(each) for each in found.attachments() if each.program == name)
        with opened.program_fd(name) as program, links.attach(program, attachment):
            return least_ns(int(program))


def main() -> None:
    """Print each, and its ratio to BCC's."""
    empty_ns = of_object(EMPTY)
    print(f"{'empty':<15} {empty_ns:6.1f} ns a call")
    measure(empty_ns, "bcc", lambda: of_bcc(BCC), "dense", lambda: of_object(DENSE))
    measure(empty_ns, "bcc, container", lambda: of_bcc(BCC_CONTAINER), "syscount", of_syscount)


def measure(empty_ns: float, peer: str, of_peer: Callable[[], float], ours: str, of_ours: Callable[[], float]) -> None:
    """Print both, and the ratio of what they take beyond the empty program."""
    peer_ns, ours_ns = of_peer(), of_ours()
    print(f"{peer:<15} {peer_ns:6.1f} ns a call")
    print(f"{ours:<15} {ours_ns:6.1f} ns a call: {(ours_ns - empty_ns) / (peer_ns - empty_ns):.2f} of it")


if __name__ == "__main__":
    main()
