"""What map types cost on this node, and what an XDP program: ``python tests/bench/map_types.py``, as root.

First ``examples/map-types.yaml`` runs as a user runs it, for some seconds, while a process on each CPU makes its
second program count. Its rows are printed in this node's order, each with its place in the article's.

Then an XDP program that reads a packet's addresses and drops or passes it is run by the kernel (BPF_PROG_TEST_RUN),
so and so often a round: without a map, and with one lookup in a map of each type, 4,096 entries, a key that differs
from packet to packet. The least of some rounds counts, each round going through all programs. Three figures:

    program     the program alone
    dropped     with the driver's part: frames taken and given back by the page pool (BPF_F_TEST_XDP_LIVE_FRAMES)
    passed      and through the stack's front door, where a frame for somebody else ends

The share is how many packets a second fewer there are with the lookup. The article found up to 20 % for LPM and 10 %
for LRU, of a data plane that did more for each packet than this program does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import interfaces, libbpf, syscall, uapi
from probefleet_agent.kernel.uapi import Command

from tests.kernel import examples_runner, network
from tests.kernel.support import compile_object
from tests.workloads import run as workloads

SECONDS, CALLS, ENTRIES = 10, 997, 4096
REPEAT, ROUNDS = 200_000, 25
LIVE_FRAMES = 1 << 1  # BPF_F_TEST_XDP_LIVE_FRAMES
DROP, PASS = 1, 2
#: From the fastest, as the article says.
ARTICLE = ("array", "percpu-array", "hash", "percpu-hash", "lru-hash", "lpm-trie")
TYPES = {
    "array": ("ARRAY", "u32", "0"),
    "percpu-array": ("PERCPU_ARRAY", "u32", "0"),
    "hash": ("HASH", "u32", "0"),
    "percpu-hash": ("PERCPU_HASH", "u32", "0"),
    "lru-hash": ("LRU_HASH", "u32", "0"),
    "lru-percpu-hash": ("LRU_PERCPU_HASH", "u32", "0"),
    "lpm-trie": ("LPM_TRIE", "struct prefix", "BPF_F_NO_PREALLOC"),
}
XDP = """
#include <bpf/bpf_endian.h>
struct prefix { u32 prefixlen; u32 address; };
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
packets SEC(".maps");
DECLARATION
SEC("xdp")
int forward(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = data + sizeof(*eth);
	u32 zero = 0, number;
	u64 *count = bpf_map_lookup_elem(&packets, &zero);

	if (!count || (void *)(ip + 1) > end || eth->h_proto != bpf_htons(0x0800))
		return XDP_ABORTED;
	*count += 1;
	number = (bpf_ntohl(ip->saddr) + (u32)*count) * 2654435761U >> 20; /* as if each packet came from somebody else */
	LOOKUP
	return VERDICT;
}
"""
#: Ethernet to somebody else, IPv4, no payload.
FRAME = bytes.fromhex("0200000000020200000000010800") + bytes.fromhex("450000140000000040110000c0000202c0000201").ljust(
    46, b"\0"
)


def ns_a_packet(program: int, *, flags: int) -> float:
    """Run it REPEAT times on the frame; the CPU time of this thread, in which it runs: others may want the CPU too."""
    frame = ctypes.create_string_buffer(FRAME, len(FRAME))
    attr = uapi.TestRun(
        prog_fd=program, data_size_in=len(FRAME), data_in=syscall.address(frame), repeat=REPEAT, flags=flags
    )
    begin = time.thread_time_ns()
    syscall.bpf(Command.PROG_TEST_RUN, attr, "run an XDP program")
    took = time.thread_time_ns() - begin
    if not flags and attr.retval not in (DROP, PASS):
        raise RuntimeError(f"the program answered {attr.retval}: it did not come to its lookup")
    return took / REPEAT


def source(kind: str, verdict: str) -> str:
    """The program with one lookup in a map of that type, or without."""
    declaration = lookup = ""
    if kind:
        name, key, flags = TYPES[kind]
        entries = 2 * ENTRIES if kind.startswith("lru") else ENTRIES
        declaration = (
            f"struct {{ __uint(type, BPF_MAP_TYPE_{name}); __uint(max_entries, {entries}); "
            f'__uint(map_flags, {flags}); __type(key, {key}); __type(value, u64); }} table SEC(".maps");'
        )
        made = "struct prefix key = {32, bpf_htonl(number)};" if kind == "lpm-trie" else "u32 key = number;"
        lookup = f"{made} u64 *there = bpf_map_lookup_elem(&table, &key); if (!there) return XDP_ABORTED;"
    else:
        lookup = 'asm volatile("" ::"r"(number));'
    return XDP.replace("DECLARATION", declaration).replace("LOOKUP", lookup).replace("VERDICT", verdict)


def fill(fd: int, kind: str, value_bytes: int) -> None:
    """Every key that the program asks for."""
    for number in range(ENTRIES):
        key = number.to_bytes(4, "little")
        if kind == "lpm-trie":
            key = (32).to_bytes(4, "little") + number.to_bytes(4, "big")
        syscall.map_update(fd, key, bytes(value_bytes))


def shares() -> Mapping[str, Mapping[str, float]]:
    """way → type ("" for no map) → the least ns a packet."""
    least: dict[str, dict[str, float]] = {}
    cpus = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as held:
        programs: dict[tuple[str, str], int] = {}
        for verdict in ("XDP_DROP", "XDP_PASS"):
            for kind in ("", *TYPES):
                opened = held.enter_context(libbpf.open_object(compile_object(source(kind, verdict)), "bench"))
                opened.load()
                if kind:
                    with opened.map_fd("table") as fd:
                        fill(int(fd), kind, 8 * (os.cpu_count() or cpus) if "percpu" in kind else 8)
                programs[kind, verdict] = int(held.enter_context(opened.program_fd("forward")))
        ways = (("program", "XDP_DROP", 0), ("dropped", "XDP_DROP", LIVE_FRAMES), ("passed", "XDP_PASS", LIVE_FRAMES))
        for _ in range(ROUNDS):
            for way, verdict, flags in ways:
                for kind in ("", *TYPES):
                    try:
                        found = ns_a_packet(programs[kind, verdict], flags=flags)
                    except KernelError as error:
                        if not flags:
                            raise
                        print(f"{way}: this kernel runs no live frames: {error}", file=sys.stderr)
                        break
                    there = least.setdefault(way, {})
                    there[kind] = min(found, there.get(kind, found))
    return least


def policy_rows() -> tuple[dict[tuple[str, ...], int], dict[tuple[str, ...], int]]:
    """The example's outputs: (operation, type) → ps alone, (type) → ps when CPUs write at once."""
    with examples_runner.running("map-types.yaml", links=1) as run:
        begin = time.monotonic()
        with contextlib.ExitStack() as held:
            busy = []
            for cpu in sorted(os.sched_getaffinity(0)):
                each = held.enter_context(workloads.start("calls", "rare", CALLS))
                os.sched_setaffinity(each.pid, {cpu})
                busy.append(each)
            for each in busy:
                each.go()
            for each in busy:
                each.done()
        time.sleep(max(0.0, SECONDS - (time.monotonic() - begin)))  # its intervals are its length
    alone = {key[1:]: value for key, value in run.rows("map-types", "alone").items()}
    together = {key[1:]: value for key, value in run.rows("map-types", "together").items()}
    return alone, together


def ordered(title: str, rows: Mapping[str, int], article: Sequence[str] = ()) -> None:
    """From the fastest, beside the place that the article gives."""
    print(title)
    for place, (kind, picoseconds) in enumerate(sorted(rows.items(), key=lambda each: each[1]), start=1):
        said = f"article: {article.index(kind) + 1}" if kind in article else ""
        print(f"  {place}. {kind:<16} {picoseconds / 1000:8.1f} ns   {said}".rstrip())


def main() -> None:
    """Print all of it."""
    kernel = subprocess.run(["uname", "-r"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"Linux {kernel}, {os.cpu_count()} CPUs")
    alone, together = policy_rows()
    for operation, article in (("lookup", ARTICLE), ("update", ()), ("count", ())):
        found = {kind: value for (done, kind), value in alone.items() if done == operation}
        ordered(f"{operation}, one CPU", found, article)
    ordered("count, all CPUs one entry at once", {kind: value for (kind,), value in together.items()})
    with network.namespace() as here, interfaces.entered(here):
        network.ip("link", "set", "lo", "up")
        measured = shares()
    print(f"one lookup in an XDP program     {''.join(f'{way:>22}' for way in measured)}")
    for kind in ("", *TYPES):
        cells = []
        for found in measured.values():
            share = f" ({found[''] / found[kind] - 1:+.0%})" if kind else ""
            cells.append(f"{found[kind]:.1f} ns{share}")
        print(f"  {kind or 'no map':<31}{''.join(f'{each:>22}' for each in cells)}")


if __name__ == "__main__":
    main()
