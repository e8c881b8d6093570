"""Damaged objects, through everything that a policy's object goes through on its way into the kernel. A process of its
own, because libbpf reads what is damaged and might end it: ``python -m tests.kernel.damage SEED COUNT BPFFS``.

Each round damages a real object, plans it as the operator does and hands the push to an agent's engine; then everything
is taken away. It prints a JSON object: how the rounds ended, and each round that left something or ended in other words
than an error's.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Collection
from pathlib import Path

from probefleet_agent import main as agent_main
from probefleet_agent.engine import Engine
from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import iterators, links, syscall
from probefleet_cli import failures, local_pods, preparation, sources
from probefleet_wire import elf_strip
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.btf_types import BtfError
from probefleet_wire.elf import ElfError
from probefleet_wire.v1 import stream_pb2

from tests.fakes.damage import damaged
from tests.kernel import support

#: Words of an error that nobody thought of.
UNTHOUGHT = ("InternalError", "BadOutput", "Traceback")
SOURCE = """
struct whose { u32 pid; u32 parent; };
struct inner { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 4); __type(key, u32); __type(value, u64); };
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, struct whose); __type(value, u64); }
TAG_counts SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS); __uint(max_entries, 2); __type(key, u32);
	__array(values, struct inner); } TAG_outer SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); } TAG_ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 4); __uint(key_size, 4); __uint(value_size, 4); }
TAG_ways SEC(".maps");
const volatile u32 every = 1;
u64 seen;
static __attribute__((noinline)) u64 *of_parent(u32 pid)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct whose key = {pid, BPF_CORE_READ(task, real_parent, tgid)};
	return bpf_map_lookup_elem(&TAG_counts, &key);
}
SEC("tracepoint/syscalls/sys_enter_getppid") int TAG_enter(void *ctx)
{
	u64 *count = of_parent(bpf_get_current_pid_tgid() >> 32), *record;
	u32 zero = 0;
	void *inner;

	seen += every;
	if (count)
		__sync_fetch_and_add(count, 1);
	inner = bpf_map_lookup_elem(&TAG_outer, &zero);
	if (inner)
		bpf_map_lookup_elem(inner, &zero);
	record = bpf_ringbuf_reserve(&TAG_ring, 8, 0);
	if (record) {
		*record = 23;
		bpf_ringbuf_submit(record, 0);
	}
	bpf_tail_call(ctx, &TAG_ways, 1);
	return 0;
}
SEC("tp_btf/sys_exit") int BPF_PROG(TAG_exit, struct pt_regs *regs, long answer) { return answer == 23 && hit(); }
"""


def whole_object(tag: str) -> bytes:
    """What is damaged; its maps and programs have the tag in their names."""
    return elf_strip.without_debug(support.compile_object(SOURCE.replace("TAG", tag)))


def manifest(data: bytes) -> dict[str, object]:
    """A policy of this object."""
    inline, digest = base64.b64encode(data).decode(), hashlib.sha256(data).hexdigest()
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": "damaged"},
        "spec": {
            "scope": "Cluster",
            "program": {"object": {"inline": inline, "sha256": digest}},
        },
    }


_catalog = functools.cache(sources.load_catalog)


def put_through(engine: Engine, data: bytes, version: int) -> tuple[str, str]:
    """Plan and push; then push nothing. How it ended, and in which words."""
    try:
        prepared = preparation.prepare([sources.Source("damaged", manifest(data))], catalog=_catalog())
    except failures.BadInput as refusal:
        return "refused by the planner", str(refusal)
    engine.apply(preparation.push(prepared, pods=local_pods.LocalPods({}), namespace=None, version=version))
    (status,) = engine.status().policies
    if status.state == stream_pb2.PolicyStatus.READY:
        engine.collect(time.time_ns(), force=True)
        outcome, words = "loaded", "it reads what it counts"
    else:
        outcome, words = "refused by the agent", f"{status.reason}: {status.message}"
    engine.apply(stream_pb2.Push(term=preparation.TERM, version=version + 1))
    return outcome, words


LISTING = """
SEC("iter/bpf_map") int list_maps(struct bpf_iter__bpf_map *ctx)
{
	struct bpf_map *map = ctx->map;

	if (map)
		BPF_SEQ_PRINTF(ctx->meta->seq, "%s\\n", map->name);
	return 0;
}
"""


def _maps() -> list[str]:
    """The names of all maps."""
    target = support.attachment("list_maps", iterator={"type": "bpf_map"})
    with (
        support.Loaded(LISTING) as loaded,
        contextlib.closing(links.attach(loaded.programs["list_maps"], target)) as it,
    ):
        text, whole = iterators.read(it.fds[0])
    assert whole
    return text.decode().splitlines()


def in_the_kernel(names: Collection[str]) -> list[str]:
    """Programs and maps with one of these names that the kernel has. A link holds its program.

    Maps are listed by an iterator. To open them by id would disturb: a program array that somebody opens and closes
    while the kernel is at emptying it was seen to stay for ever on 6.18. (Probably prog_array_map_clear() of
    kernel/bpf/arraymap.c takes a reference each time that it queues its work, and the work, queued gives one back.)
    """
    wanted = {name[:15] for name in names}
    found = []
    for number in syscall.ids("program"):
        with contextlib.suppress(KernelError), syscall.fd_by_id("program", number) as fd:
            if (name := syscall.program_info(fd).name) in wanted:
                found.append(f"program {name}")
    return found + [f"map {name}" for name in _maps() if name in wanted]


def names_in(data: bytes) -> set[str]:
    """What the kernel would call what is in an object, as far as it can be read."""
    try:
        parsed = BpfObject.parse(data)
    except (ElfError, BtfError):
        return set()
    return {each.name for each in parsed.programs} | {each.name for each in parsed.maps}


def main(seed: int, count: int, bpffs: Path) -> None:
    agent_main.configure_logs("text")  # to stderr
    tag = f"d{os.getpid() % 100_000}"
    whole = whole_object(tag)
    own = {each for each in names_in(whole) if tag in each}
    ends: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    with Engine.open(bpffs=bpffs, stats=False) as engine:
        if (found := put_through(engine, whole, 1))[0] != "loaded":
            wrong.append(f"undamaged: {found}")
        before = descriptors(), pins(bpffs)
        for number in range(count):
            data = damaged(whole, random.Random(f"{seed} {number}"))
            print(f"round {number}", file=sys.stderr, flush=True)  # where libbpf ended us
            outcome, words = put_through(engine, data, 2 * number + 3)
            ends[outcome] += 1
            if not words or any(each in words for each in UNTHOUGHT):
                wrong.append(f"round {number}: {outcome}: {words}")
            if (now := (descriptors(), pins(bpffs))) != before:
                wrong.append(f"round {number}: {outcome}: descriptors and pins were {before}, are {now}")
                before = now
            if "-v" in sys.argv:
                print(f"round {number}: {outcome}: {words[:300]}", file=sys.stderr)
        left = in_the_kernel(own)
        for _ in range(100):  # the kernel lets go of programs after a grace period
            if not left:
                break
            time.sleep(0.05)
            left = in_the_kernel(own)
        wrong += [f"left in the kernel: {each}" for each in left]
        engine.remove_everything()
    print(json.dumps({"ends": ends, "wrong": wrong}))


def descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def pins(bpffs: Path) -> int:
    """How many things are pinned."""
    return sum(1 for _ in bpffs.rglob("*"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
