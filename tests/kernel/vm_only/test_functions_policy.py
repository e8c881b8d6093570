"""Policies on functions of the kernel, by the command line that a user has: BTF, patterns and LSM hooks, exact."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest
from probefleet_agent.kernel import features
from probefleet_wire import elf_strip

from tests.kernel.support import compile_object, needs
from tests.kernel.vm_only.test_kprobes import SECONDS, make_calls, policy, report_of, running, totals
from tests.workloads import run as workloads

# sched_get_priority_max(1) answers 99; calls of other processes are left out by the argument.
CORE = """
#include <probefleet.h>

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, function_t);
    __type(value, u64);
} functions SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, s64);
    __type(value, u64);
} answers SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, comm_t);
    __type(value, u64);
} openers SEC(".maps");

static __always_inline void add(void *map, const void *key)
{
    u64 one = 1, *count = bpf_map_lookup_elem(map, key);

    if (count)
        __sync_fetch_and_add(count, 1);
    else
        bpf_map_update_elem(map, key, &one, BPF_NOEXIST);
}

SEC("kprobe.multi/__x64_sys_sched_get_priority_m*")
int on_call(struct pt_regs *ctx)
{
    function_t function = bpf_get_func_ip(ctx);

    add(&functions, &function);
    return 0;
}

SEC("fexit/__x64_sys_sched_get_priority_max")
int BPF_PROG(on_answer, const struct pt_regs *regs, long answer)
{
    s64 key = answer;

    add(&answers, &key);
    return 0;
}

SEC("lsm.s/file_open")
int BPF_PROG(on_open, struct file *file, int verdict)
{
    comm_t name = {};

    bpf_get_current_comm(name, sizeof(name));
    add(&openers, name);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
"""


@pytest.mark.timeout(2 * SECONDS)
def test_a_pattern_a_trampoline_and_a_hook_count_exactly(tmp_path: Path) -> None:
    needs(features.cookies)  # bpf_get_func_ip() came with them, in Linux 5.15
    outputs = [
        {"name": name, "from": {"map": name}, "counter": {}, "groupBy": ["key"]}
        for name in ("functions", "answers", "openers")
    ]
    # Compiled here: the sandbox's 40 s are short for clang on an emulated CPU that others use, too.
    data = elf_strip.without_debug(compile_object(CORE, prelude=False))
    program = {"sha256": hashlib.sha256(data).hexdigest(), "inline": base64.b64encode(data).decode()}
    file = policy(tmp_path / "functions.yaml", {"object": program}, outputs=outputs)
    with running(file, links=3) as process:
        make_calls(997, 1)
        make_calls(23, -1)
        with workloads.start("opens", 499, "/proc/version") as workload:
            workload.go()
            workload.done()
        report = report_of(process)
    assert totals(report, "answers") == {"99": 997, "-22": 23}
    functions = totals(report, "functions")
    assert {name.partition("_sys_")[2]: count for name, count in functions.items()}["sched_get_priority_max"] == 1020
    assert totals(report, "openers")["opens"] == 499
