"""From a policy and its object to a plan, with real objects: the catalog's, and C compiled here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_core import (
    bcc_source,
    catalog,
    errors,
    map_facts,
    observe_only,
    outputs,
    planner,
    policy,
    policy_shape,
    probe_maps,
    to_wire,
    values,
)
from probefleet_wire.bpf_object import BpfObject, MapDef
from probefleet_wire.map_types import MapType
from probefleet_wire.v1 import plan_pb2

from tests.bpf_c import compiled

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]
COUNTER = """
#include "probefleet.h"
struct who { cgroup_id_t cgroup; user_id_t user; };
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, struct who);
    __type(value, u64);
} execs SEC(".maps");
SEC("tp_btf/sched_process_exec")
int on_exec(void *ctx)
{
    struct who who = {};
    who.cgroup = bpf_get_current_cgroup_id();
    if (!probefleet_selected(who.cgroup))
        return 0;
    who.user = bpf_get_current_uid_gid();
    probefleet_add(&execs, &who, 1);
    return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""
# What most programs here need of vmlinux.h and bpf_helpers.h, which take half a second to read.
SMALL = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
#define SEC(name) __attribute__((section(name), used))
#define __uint(name, number) int (*name)[number]
#define __type(name, kind) typeof(kind) *name
#define __noinline __attribute__((noinline))
#define __ksym __attribute__((section(".ksyms")))
#define __weak __attribute__((weak))
enum { BPF_MAP_TYPE_HASH = 1, BPF_MAP_TYPE_ARRAY = 2, BPF_MAP_TYPE_PERF_EVENT_ARRAY = 4,
       BPF_MAP_TYPE_PERCPU_HASH = 5,
       BPF_MAP_TYPE_PERCPU_ARRAY = 6, BPF_MAP_TYPE_STACK_TRACE = 7, BPF_MAP_TYPE_LRU_HASH = 9,
       BPF_MAP_TYPE_RINGBUF = 27 };
static long (*bpf_probe_write_user)(void *, const void *, u32) = (void *)36;
static long (*bpf_override_return)(void *, u64) = (void *)58;
static long (*bpf_send_signal)(u32) = (void *)109;
"""
# Everything that a map can hold, in one object.
MAPS = (
    SMALL
    + """
typedef int stack_id_t;
struct two { u64 calls; u64 bytes; char name[8]; };
struct sized { u32 port; u32 slot; };
struct event { u64 time; char text[16]; };
struct nothing { char text[16]; };
struct at { stack_id_t stack; u32 pid; };
#define MAP(name, kind, n, k, v) struct { __uint(type, BPF_MAP_TYPE_##kind); __uint(max_entries, n); \\
    __type(key, k); __type(value, v); } name SEC(".maps")
MAP(one, HASH, 100, u32, u64);
MAP(pair, PERCPU_HASH, 100, u32, struct two);
MAP(slots, ARRAY, 1, u32, u64[64]);
MAP(by_key, LRU_HASH, 100, struct sized, u64);
MAP(at_index, PERCPU_ARRAY, 7, u32, u64);
MAP(few, HASH, 10, u32, u64[3]);
MAP(text, HASH, 10, u32, struct nothing);
MAP(stacks_of, HASH, 10, struct at, u64);
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); __type(value, struct event); }
    ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); } bare SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 4); __uint(key_size, 4); __uint(value_size, 8); }
    sizes SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_STACK_TRACE); __uint(max_entries, 64); __uint(key_size, 4);
    __uint(value_size, 1016); } traces SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY); __uint(key_size, 4); __uint(value_size, 4); } perf SEC(".maps");
struct event unused;
SEC("raw_tp/sched_switch") int on_switch(void *ctx) { unused.time = 1; return 0; }
char LICENSE[] SEC("license") = "GPL";
"""
)


def program(section: str, body: str = "return 0;") -> str:
    """One program and one map that is fit to be an output."""
    return f"""{SMALL}
struct {{ __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 16); __type(key, u32); __type(value, u64); }}
    counts SEC(".maps");
SEC("{section}") int run(void *ctx) {{ {body} }}
char LICENSE[] SEC("license") = "GPL";
"""


@functools.cache
def shipped() -> catalog.Catalog:
    """One probe of the catalog, compiled here: tests do not depend on what was built before."""
    folder = ROOT / "bpf/syscount"
    probe = catalog.parse_probe(
        "syscount", (folder / "probe.yaml").read_text(), compiled((folder / "syscount.bpf.c").read_text())
    )
    return catalog.Catalog({"syscount": probe}, compiled((ROOT / "bpf/agent/endpoints.bpf.c").read_text()))


def parsed(spec: Json, name: str = "slow") -> values.ProbePolicy:
    return policy.parse_policy(
        {
            "apiVersion": "probefleet.io/v1alpha1",
            "kind": "ProbePolicy",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": spec,
        }
    )


def plan(spec: Json, elf: bytes | None = None, name: str = "slow", **others: Any) -> planner.Planned:
    arguments: Json = {"catalog": shipped(), "elf": elf, "probe_maps": {}, "cpus": 2, **others}
    return planner.plan(parsed(spec, name), **arguments)


def refused(spec: Json, elf: bytes | None = None, **others: Any) -> list[errors.Problem]:
    with pytest.raises(errors.PolicyRefused) as caught:
        plan(spec, elf, **others)
    return list(caught.value.problems)


def of_catalog(name: str = "syscount", parameters: Json | None = None, **spec: Any) -> Json:
    return {"program": {"catalog": {"name": name, "parameters": parameters or {}}}, **spec}


def own(kind: str = "c", source: str = "x", **spec: Any) -> Json:
    return {"scope": "Cluster", "program": {kind: {"source": source}}, **spec}


def output(name: str, of: str, kind: str = "counter", **more: Any) -> Json:
    source = {"map": of, **more.pop("source", {})}
    return {"name": name, "from": source, kind: more.pop("how", {}), **more}


# The catalog.


def test_a_catalog_probe_becomes_a_plan() -> None:
    made = plan(of_catalog(parameters={"syscalls": "getppid", "latency": "false"}, interval="5s"))
    probe = shipped().probes["syscount"]
    assert made.plan.instance.title == "catalog/syscount"
    assert made.plan.instance.object.sha256 == probe.sha256
    assert made.objects == {probe.sha256: probe.elf}
    settings = {each.variable: each.value for each in made.plan.instance.parameters}
    assert settings["latency"] == b"\0"
    assert int.from_bytes(settings["syscalls"], "little") == 1 << 110, "getppid is number 110 on x86-64"
    assert [each.name for each in made.plan.outputs] == ["calls", "latency"]
    assert made.plan.filters_pods and made.plan.scope == plan_pb2.SCOPE_NAMESPACE
    assert (made.plan.interval_ms, made.plan.budget.cpu_millicores) == (5000, 100)
    assert {each.alternative for each in made.plan.instance.attachments} == {"enter", "exit", "thread"}
    assert made.summary.verbs == ("create probepolicies.probefleet.io",)
    assert f"probefleet/instances/{made.plan.instance.digest}/map_calls" in made.summary.pins
    assert made.summary.map_bytes == sum(size for _, size in made.summary.maps)


def test_all_wrong_parameters_are_named() -> None:
    found = refused(of_catalog(parameters={"latenc": "true", "latency": "maybe", "syscalls": "opn"}))
    assert [each.path.rpartition(".")[2] for each in found] == ["latenc", "latency", "syscalls"]
    assert "Did you mean latency?" in found[0].write


def test_an_unknown_probe_is_named_with_near_ones() -> None:
    assert refused(of_catalog("syscout"))[0].write == "Did you mean syscount?"
    assert refused(of_catalog("x"))[0].write == "Known: syscount."


def test_what_makes_an_instance_differ_is_its_digest() -> None:
    def digest(spec: Json, name: str = "slow", cpus: int = 2) -> str:
        made = plan(spec, name=name, cpus=cpus).plan.instance.digest
        assert len(made) == 32
        return made

    base = digest(of_catalog())
    assert base == digest(of_catalog(interval="3s", budget={"cpu": 1}), name="other", cpus=8)
    assert base == digest(of_catalog(outputs=[output("o", "calls", groupBy=["pod"])]))
    assert base == digest(of_catalog(parameters={"latency": "true"})), "the default said aloud"
    assert base != digest(of_catalog(parameters={"latency": "false"}))
    assert base != digest(of_catalog(maps=[{"name": "calls", "maxEntries": 64}]))


def test_outputs_of_ones_own_group_as_the_catalog_does() -> None:
    asked = [output("a", "calls"), output("b", "durations", "histogram"), output("c", "calls", "topk")]
    made = plan(of_catalog(outputs=asked)).plan.outputs
    assert list(made[0].group_by) == ["workload", "key.syscall"]
    assert (made[1].value, made[1].histogram.slots) == ("slots", "value")
    assert list(made[2].group_by) == ["pod", "key.syscall"], "another kind than the catalog's"


def test_a_namespace_is_a_choice_of_pods() -> None:
    """in_flight is keyed by thread: nothing in it says whose pod an entry is."""
    found = refused(of_catalog(outputs=[output("a", "in_flight", source={"value": "started"})]))
    assert "does not say whose event it is" in found[0].why
    plan(of_catalog(scope="Cluster", outputs=[output("a", "in_flight", source={"value": "started"})]))


def test_maps_over_the_budget_are_refused_before_any_node_hears_of_them() -> None:
    found = refused(of_catalog(budget={"mapMemory": "1Mi"}), node_count=1000)
    assert found[0].path == "spec.budget.mapMemory"
    assert "on 1,000 nodes" in found[0].what and "durations" in found[0].why
    smaller = [{"name": name, "maxEntries": 16} for name in ("calls", "durations", "in_flight")]
    plan(of_catalog(budget={"mapMemory": "2Mi"}, maps=smaller))


# C and objects.


def test_c_is_read_by_its_btf() -> None:
    elf = compiled(COUNTER)
    made = plan(own(), elf)
    assert made.plan.instance.title == "c/slow"
    assert [to_wire.describe(values.BtfTracepoint(made.plan.instance.attachments[0].tp_btf.name))] == [
        "tpBtf sched_process_exec"
    ]
    (only,) = made.plan.outputs
    assert (only.name, only.kind, list(only.group_by)) == ("execs", plan_pb2.Output.TOPK, ["pod", "key.user"])
    assert made.summary.verbs[1:] == (
        "use-cluster-scope probepolicies.probefleet.io",
        "use-program probepolicies.probefleet.io",
    )
    assert made.summary.programs == ("on_exec: tpBtf sched_process_exec",)


def test_pods_can_be_chosen_where_the_program_asks() -> None:
    pods = {"selector": {"matchLabels": {"app": "web"}}}
    assert plan(own(pods=pods), compiled(COUNTER)).plan.filters_pods
    found = refused(own(pods=pods), compiled(program("raw_tp/sched_switch")))
    assert [each.path for each in found] == ["spec.pods", "spec.pods"]
    assert "probefleet_selected" in found[0].why
    silent = COUNTER.replace("!probefleet_selected(who.cgroup)", "!who.cgroup")
    (found_one,) = refused(own(pods=pods), compiled(silent))
    assert "probefleet_selected" in found_one.why, "the header alone does not ask"
    decoded = [output("a", "counts", decode={"key": "cgroup"})]
    found = refused(own(pods=pods, outputs=decoded), compiled(program("raw_tp/sched_switch")))
    assert len(found) == 1, "the identity is decoded, the filter is still missing"


def test_every_map_that_btf_describes_is_an_output() -> None:
    made = {each.name: each for each in plan(own(), compiled(MAPS)).plan.outputs}
    kinds = {name: plan_pb2.Output.Kind.Name(each.kind) for name, each in made.items()}
    assert kinds == {
        "one": "TOPK",
        "pair_calls": "TOPK",
        "pair_bytes": "TOPK",
        "slots": "HISTOGRAM",
        "by_key": "TOPK",
        "at_index": "COUNTER",
        "stacks_of": "STACKS",
        "ring": "EVENTS",
    }
    assert list(made["by_key"].group_by) == ["key.port", "key.slot"]
    assert list(made["stacks_of"].group_by) == ["key.pid"]
    assert (list(made["slots"].group_by), made["slots"].histogram.slots) == ([], "value")
    assert list(made["at_index"].group_by) == ["key"]


@pytest.mark.parametrize(
    ("asked", "path", "says"),
    [
        (output("a", "on"), "from.map", "Did you mean one?"),
        (output("a", "traces"), "from.map", "a map of type stack-trace is not read"),
        (output("a", "ring"), "counter", "Write events: {}."),
        (output("a", "one", "events"), "events", "such a map carries numbers"),
        (output("a", "pair"), "from.value", "has 2 numbers"),
        (output("a", "pair", source={"value": "call"}), "from.value", "Did you mean calls"),
        (output("a", "pair", source={"value": "name"}), "from.value", "it is no number"),
        (output("a", "text"), "from.value", "holds no number"),
        (output("a", "slots"), "from.value", "an array of 64"),
        (output("a", "one", "histogram", how={"slots": "value"}), "histogram.slots", "value is one number"),
        (output("a", "by_key", "histogram", how={"slots": "key.slt"}), "histogram.slots", "Did you mean key.slot"),
        (output("a", "by_key", "histogram", groupBy=["key.slot"]), "groupBy[0]", "the histogram's slot"),
        (output("a", "one", groupBy=["pod"]), "groupBy[0]", "cgroup_id_t"),
        (output("a", "by_key", groupBy=["key.prt"]), "groupBy[0]", "Did you mean key.port"),
        (output("a", "one", "stacks"), "stacks", "has no stack id"),
        (output("a", "bare", "events"), "from.record", "does not say what a record is"),
        (output("a", "bare", "events", source={"record": "struct evnt"}), "from.record", "no struct of that name"),
    ],
)
def test_outputs_are_checked_against_the_maps(asked: Json, path: str, says: str) -> None:
    (found,) = refused(own(outputs=[asked]), compiled(MAPS))
    assert found.path == f"spec.outputs[0].{path}"
    assert says in str(found)


def test_outputs_are_completed_from_the_maps() -> None:
    asked = [
        output("slot-field", "by_key", "histogram"),
        output("key-slot", "one", "histogram"),
        output("array", "slots", "histogram"),
        output("by-node", "one", groupBy=["node", "key"]),
        output("named", "bare", "events", source={"record": "struct event"}),
        output("max", "pair", "gauge", how={"merge": "max"}, source={"value": "bytes"}),
        output("pods", "one", groupBy=["pod"], decode={"key": "cgroup"}),
        output("stacks", "stacks_of", "stacks"),
        output("explicit", "by_key", "histogram", how={"slots": "key.slot"}),
    ]
    made = {each.name: each for each in plan(own(outputs=asked), compiled(MAPS)).plan.outputs}
    assert made["slot-field"].histogram.slots == "key.slot"
    assert list(made["slot-field"].group_by) == ["key.port"]
    assert made["key-slot"].histogram.slots == "key" and not made["key-slot"].group_by
    assert made["array"].histogram.slots == "value"
    assert list(made["by-node"].group_by) == ["node", "key"]
    assert made["named"].record == "event"
    assert (made["max"].merge, made["max"].value) == (plan_pb2.Output.MAX, "bytes")
    assert list(made["explicit"].group_by) == ["key.port"]


def test_a_program_without_readable_maps_has_no_output() -> None:
    source = (
        SMALL
        + """
SEC("raw_tp/sched_switch") int run(void *ctx) { return 0; }
"""
    )
    assert refused(own(), compiled(source))[0].path == "spec.outputs"


@pytest.mark.parametrize(
    ("section", "target"),
    [
        ("tracepoint/sched/sched_switch", "tracepoint sched:sched_switch"),
        ("tp/sched/sched_switch", "tracepoint sched:sched_switch"),
        ("raw_tracepoint/sched_switch", "rawTracepoint sched_switch"),
        ("tp_btf/sched_switch", "tpBtf sched_switch"),
        ("kprobe/tcp_sendmsg+4", "kprobe tcp_sendmsg+4"),
        ("kretprobe/tcp_sendmsg", "kretprobe tcp_sendmsg"),
        ("ksyscall/execve", "syscall execve"),
        ("kretsyscall/execve", "syscall execve (return)"),
        ("uprobe//bin/sh:main", "uprobe /bin/sh:main"),
        ("uprobe.s/bin/sh:main+0x10", "uprobe /bin/sh:main+16"),
        ("uretprobe//bin/sh:0x40", "uretprobe /bin/sh:0x40"),
        ("uprobe/libc.so.6:malloc", "uprobe libc.so.6:malloc"),
        ("kprobe.multi/tcp_*", "kprobe tcp_*"),
        ("kretprobe.multi/tcp_*", "kretprobe tcp_*"),
        ("fentry/tcp_sendmsg", "fentry tcp_sendmsg"),
        ("fexit.s/tcp_sendmsg", "fexit tcp_sendmsg"),
        ("lsm/file_open", "lsm file_open"),
        ("lsm.s/file_open", "lsm file_open"),
        ("usdt//bin/x:provider:name", "usdt /bin/x:provider:name"),
        ("usdt/libpython3.11.so.1.0:python:gc__done", "usdt libpython3.11.so.1.0:python:gc__done"),
    ],
)
def test_sections_name_targets(section: str, target: str) -> None:
    found = observe_only.read_section(section)
    assert isinstance(found, observe_only.Section) and found.target is not None
    assert to_wire.describe(found.target) == target
    assert to_wire.kind_of(found.target) in found.fits


@pytest.mark.parametrize(
    "section",
    [
        *("kprobe", "uprobe", "tp", "raw_tp", "tp_btf", "ksyscall", "perf_event"),
        *("kprobe.multi", "fentry", "fexit", "lsm", "usdt"),
    ],
)
def test_sections_without_a_target_need_attach(section: str) -> None:
    elf = compiled(program(section))
    found = refused(own(), elf)
    assert found[0].path == "spec.attach" and "would never run" in found[0].why
    assert plan(own(), compiled(MAPS + f'SEC("?{section}") int idle(void *ctx) {{ return 0; }}')).plan


@pytest.mark.parametrize(
    ("section", "attach", "field"),
    [
        ("kprobe", {"kretprobe": {"function": "f"}}, "kprobe"),
        ("kprobe", {"syscall": {"name": "execve", "return": True}}, "syscall"),
        ("tp/a/b", {"tracepoint": {"category": "c", "name": "d"}}, "tracepoint"),
        ("raw_tp/a", {"rawTracepoint": {"name": "d"}}, "raw_tracepoint"),
        ("uprobe", {"uprobe": {"path": "/bin/sh", "symbol": "main", "pid": 3}}, "uprobe"),
        ("uprobe", {"uprobe": {"library": "libc", "symbol": "malloc"}}, "uprobe"),
        ("kprobe", {"kprobe": {"functions": "tcp_*"}}, "kprobe_pattern"),
        ("fentry/f", {"fexit": {"function": "g"}}, "fentry"),
        ("lsm", {"lsm": {"hook": "file_open"}}, "lsm"),
        ("usdt", {"usdt": {"path": "/bin/x", "provider": "p", "name": "n"}}, "usdt"),
        ("perf_event", {"perfEvent": {"event": "cpu-clock", "frequency": 99}}, "perf_event"),
    ],
)
def test_attach_overrides_sections(section: str, attach: Json, field: str) -> None:
    made = plan(own(attach=[{"program": "run", **attach}]), compiled(program(section)))
    assert [each.WhichOneof("target") for each in made.plan.instance.attachments] == [field]
    assert made.summary.programs[0].startswith("run: ")


def test_attach_is_checked_against_the_programs() -> None:
    elf = compiled(program("raw_tp/sched_switch"))
    found = refused(own(attach=[{"program": "runn", "rawTracepoint": {"name": "a"}}]), elf)
    assert found[0].write == "Did you mean run?"
    found = refused(own(attach=[{"program": "run", "kprobe": {"function": "f"}}]), elf)
    assert found[0].path == "spec.attach[0]" and "rawTracepoint" in found[0].write


@pytest.mark.parametrize(
    ("section", "one", "other", "why"),
    [
        ("fentry", {"fentry": {"function": "f"}}, {"fexit": {"function": "g"}}, "binds a program to its fentry target"),
        ("tp_btf", {"tpBtf": {"name": "a"}}, {"tpBtf": {"name": "b"}}, "binds a program to its tpBtf target"),
        ("kprobe", {"kprobe": {"functions": "tcp_*"}}, {"kprobe": {"function": "f"}}, "loaded in another way"),
    ],
)
def test_what_is_bound_at_load_has_one_target(section: str, one: Json, other: Json, why: str) -> None:
    elf = compiled(program(section))
    found = refused(own(attach=[{"program": "run", **each} for each in (one, other)]), elf)
    assert [why in each.why for each in found] == [True]
    assert plan(own(attach=[{"program": "run", **one}]), elf).plan


@pytest.mark.parametrize(
    "section",
    [
        *("xdp/devmap", "netfilter", "cgroup/connect4", "sk_skb"),
        *("lsm_cgroup/file_open", "struct_ops/x", "fmod_ret/f", "sockops", "raw_tp.w/x", "netfilter"),
        *("freplace/f", "sk_lookup"),
    ],
)
def test_programs_that_decide_are_refused(section: str) -> None:
    found = refused(own(), compiled(program(section)))
    assert any("observes only" in each.why for each in found), found


@pytest.mark.parametrize("section", ["uprobe.multi/x", "kprobe.session/f", "nonsense"])
def test_programs_of_other_types_are_refused(section: str) -> None:
    assert "the program is of" in refused(own(), compiled(program(section)))[0].why


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("bpf_send_signal(9);", "bpf_send_signal"),
        ("u32 x = 0; bpf_probe_write_user(ctx, &x, 4);", "bpf_probe_write_user"),
        ("bpf_override_return(ctx, 1);", "bpf_override_return"),
    ],
)
def test_helpers_that_change_things_are_refused(call: str, name: str) -> None:
    found = refused(own(), compiled(program("kprobe/f", f"{call} return 0;")))
    assert found[0].what == f"it calls {name}"
    # In a function of its own, too: what programs call lies in another section.
    inside = program("kprobe/f", "return hidden(ctx);").replace(
        'SEC("kprobe/f")', f'static __noinline int hidden(void *ctx) {{ {call} return 0; }}\nSEC("kprobe/f")'
    )
    assert refused(own(), compiled(inside))[0].what == f"it calls {name}"


def test_kernel_functions_that_only_look_are_let_through() -> None:
    def source(name: str) -> str:
        return program("tp_btf/sched_switch", f"{name}(); return 0;").replace(
            'SEC("tp_btf', f'extern void {name}(void) __ksym __weak;\nSEC("tp_btf'
        )

    assert plan(own(), compiled(source("bpf_rcu_read_lock")))
    assert refused(own(), compiled(source("cgroup_kill_all")))[0].what == "it calls cgroup_kill_all"


def test_objects_are_pinned_by_their_hash() -> None:
    elf = compiled(COUNTER)
    sha256 = hashlib.sha256(elf).hexdigest()
    spec: Json = {
        "scope": "Cluster",
        "program": {"object": {"sha256": sha256, "configMapKeyRef": {"name": "a", "key": "b"}}},
    }
    made = plan(spec, elf)
    assert made.plan.instance.title == "object/slow" and set(made.objects) == {sha256}
    found = refused(spec, elf + b"\0")
    assert found[0].path == "spec.program.object.sha256"
    with pytest.raises(ValueError, match="needs the object"):
        plan(spec)
    inline = dataclasses.replace(parsed(spec), program=values.ObjectProgram(sha256, inline=elf))
    again = planner.plan(inline, catalog=shipped(), elf=None, probe_maps={})
    assert again.plan.instance.digest == made.plan.instance.digest


@pytest.mark.parametrize(("elf", "says"), [(b"", "not an ELF file"), (b"\x7fELF" + bytes(60), "ELF")])
def test_garbage_is_no_object(elf: bytes, says: str) -> None:
    assert says in refused(own(), elf)[0].why


def test_objects_without_btf_or_programs_are_refused() -> None:
    assert refused(own(), compiled(program("raw_tp/x"), btf=False))[0].what == "an object without BTF"
    empty = SMALL + 'int counter SEC(".data");\n'
    assert {each.what for each in refused(own(), compiled(empty))} == {"no program", "missing"}


def test_who_provides_the_object() -> None:
    kinds = [
        of_catalog(),
        own(),
        own("bcc"),
        {"scope": "Cluster", "program": {"object": {"sha256": "a" * 64, "inline": "aaaa"}}},
        {
            "scope": "Cluster",
            "program": {"object": {"sha256": "a" * 64, "configMapKeyRef": {"name": "a", "key": "b"}}},
        },
    ]
    assert [planner.object_from(parsed(spec)).name for spec in kinds] == [
        *("CATALOG", "COMPILER", "NOBODY", "INLINE", "CONFIG_MAP")
    ]


# BCC.

BCC = """
/* BPF_HASH(commented, u32); */
struct key_t { u32 uid; char comm[16], more; };
typedef struct { u64 port; u64 slot; } by_port_t;
BPF_HASH(execs, struct key_t);   // by user
BPF_HASH(simple);
BPF_HASH(sized, u32, u64, 1024);
BPF_HISTOGRAM(plain);
BPF_HISTOGRAM(ports, by_port_t);
BPF_ARRAY(stats, u64, 4);
BPF_TABLE("percpu_hash", u32, u64, percpu, 64);
BPF_TABLE("hash", u32);
BPF_PERF_OUTPUT(events);
BPF_RINGBUF_OUTPUT(ring, 8);
BPF_STACK_TRACE(stacks, 1024);
int kprobe__f(void *ctx) { return 0; }
"""


def test_bccs_tables_are_its_outputs() -> None:
    made = plan(own("bcc", BCC))
    assert made.plan.instance.bcc.source == BCC and not made.objects
    assert not made.plan.instance.attachments and made.summary.programs[0].startswith("compiled")
    found = {each.name: each for each in made.plan.outputs}
    assert set(found) == {"execs", "simple", "sized", "plain", "ports", "stats", "percpu", "events", "ring"}
    assert list(found["execs"].group_by) == ["key.uid", "key.comm", "key.more"]
    assert list(found["simple"].group_by) == ["key"]
    assert found["plain"].histogram.slots == "key"
    assert (found["ports"].histogram.slots, list(found["ports"].group_by)) == ("key.slot", ["key.port"])
    assert found["ports"].histogram.scale == plan_pb2.Histogram.LOG2_BCC
    assert found["events"].kind == plan_pb2.Output.EVENTS


def test_bccs_outputs_may_name_what_the_text_does_not_tell() -> None:
    asked = [
        output("a", "execs", "topk"),
        output("b", "ports", "histogram"),
        output("c", "hidden", "topk"),
        output("d", "hidden", "histogram"),
        output("e", "execs", groupBy=[]),
    ]
    found = {each.name: each for each in plan(own("bcc", BCC, outputs=asked)).plan.outputs}
    assert list(found["a"].group_by) == ["key.uid", "key.comm", "key.more"]
    assert (found["b"].histogram.slots, list(found["b"].group_by)) == ("key.slot", ["key.port"])
    assert not found["c"].group_by and found["d"].histogram.slots == "key" and not found["e"].group_by


def test_bccs_mistakes_are_found_in_the_text() -> None:
    assert refused(own("bcc", "int x;"))[0].path == "spec.outputs"
    found = refused(own("bcc", BCC + "int g(void *c) { bpf_send_signal(9); return 0; }"))
    assert found[0].what == "it calls bpf_send_signal"
    plan(own("bcc", BCC + "/* no bpf_send_signal(9) here */"))
    attach = [{"program": "kprobe__g", "kprobe": {"function": "f"}}]
    assert refused(own("bcc", BCC, attach=attach))[0].path == "spec.attach[0].program"
    attach = [{"program": "kprobe__f", "kprobe": {"function": "f"}}]
    made = plan(own("bcc", BCC, attach=attach))
    assert made.plan.instance.attachments[0].kprobe.function == "f"
    assert refused(own("bcc", BCC, maps=[{"name": "nowhere", "maxEntries": 4}]))[0].path == "spec.maps[0].name"


def test_bcc_programs_that_ask_for_pods() -> None:
    pods = {"selector": {}}
    assert refused(own("bcc", BCC, pods=pods))[0].path == "spec.pods"
    asking = BCC.replace("return 0;", "return probefleet_selected(1);")
    assert plan(own("bcc", asking, pods=pods)).plan.filters_pods


def test_two_bcc_policies_with_one_text_share_a_program() -> None:
    first, second = plan(own("bcc", BCC), name="a").plan, plan(own("bcc", BCC), name="b").plan
    assert first.instance.digest == second.instance.digest
    assert (first.instance.title, second.instance.title) == ("bcc/a", "bcc/b")
    assert plan(own("bcc", BCC + " ")).plan.instance.digest != first.instance.digest


def test_bcc_fields_of_what_is_no_struct() -> None:
    assert bcc_source.fields_of("", "u32") is None
    assert bcc_source.fields_of("struct a { u32 x:3; u8 y[2]; };", "struct a") == ("x", "y")


# ProbeMaps.


def probe_map(**spec: Any) -> values.ProbeMap:
    return policy.parse_probe_map(
        {
            "apiVersion": "probefleet.io/v1alpha1",
            "kind": "ProbeMap",
            "metadata": {"name": "conns", "namespace": "shop", "uid": "map-1"},
            "spec": {"type": "hash", "maxEntries": 16, "key": "u32 pid", "value": "u64 n", **spec},
        }
    )


def made_map(**spec: Any) -> planner.CompiledProbeMap:
    found = probe_map(**spec)
    return planner.CompiledProbeMap(found, compiled(planner.probe_map_source(found)))


@pytest.mark.parametrize("kind", list(values.MapType))
def test_every_type_of_probe_map_compiles(kind: values.MapType) -> None:
    of_maps = kind in policy_shape.OF_MAPS
    keyed = "hash" in kind or kind in (values.MapType.LPM_TRIE, *policy_shape.CGROUP_STORAGE)
    key = "struct { pid_nr_t pid; u16 port; }"
    if kind is values.MapType.LPM_TRIE:
        key = "struct { u32 prefixlen; ipv4_t address; }"
    elif kind in (*policy_shape.CGROUP_STORAGE, values.MapType.HASH_OF_MAPS):
        key = "u64 n"
    spec: Json = {"type": kind.value, "key": key if keyed else None}
    valueless = (values.MapType.STACK_TRACE, values.MapType.PROG_ARRAY, values.MapType.RINGBUF)
    spec["value"] = None if kind in valueless or "event" in kind or of_maps else "struct { u64 n; comm_t name; }"
    spec["maxEntries"] = None if "storage" in kind else 4096
    if of_maps:
        keys = {"keys": [7, "0x17"]} if keyed else {}
        spec["inner"] = {"type": "hash", "maxEntries": 16, "key": "u32 pid", "value": "u64 n", **keys}
    made = made_map(**spec)
    definition, _ = probe_maps.definition_of(made.probe_map, made.elf)
    assert map_facts.type_name(definition.type) == kind
    wire = planner.plan_probe_map(made)
    assert (wire.uid, wire.map, wire.sha256) == ("map-1", "shared", hashlib.sha256(made.elf).hexdigest())
    if keyed:
        assert definition.key_bytes == 8
    if of_maps:
        places = [7, 0x17] if keyed else range(4096)
        size = 8 if keyed else 4
        assert wire.inner_keys == b"".join(place.to_bytes(size, "little") for place in places)
        assert definition.inner is not None and (definition.inner.key_bytes, definition.inner.max_entries) == (4, 16)
        alone = map_facts.bytes_of(definition, cpus=2)
        inner = len(places) * map_facts.bytes_of(definition.inner, cpus=2)
        assert probe_maps.bytes_of(made.probe_map, made.elf, cpus=2) == alone + inner
    if kind in (values.MapType.RINGBUF, values.MapType.PERF_EVENT_ARRAY):
        spec["value"] = "struct { u64 n; comm_t name; }"
        assert planner.plan_probe_map(made_map(**spec)), "what a record is"


@pytest.mark.parametrize(
    ("keys", "path", "says"),
    [
        (["x"], "spec.inner.keys[0]", "does not fit"),
        ([1, 256], "spec.inner.keys[1]", "256 does not fit"),
        ([1, "0x1"], "spec.inner.keys[1]", "item 0 is the same key"),
    ],
)
def test_keys_of_inner_maps_are_typed(keys: list[int | str], path: str, says: str) -> None:
    inner = {"type": "array", "maxEntries": 16, "value": "u64 n", "keys": keys}
    made = made_map(type="hash-of-maps", key="u8 place", value=None, inner=inner)
    with pytest.raises(errors.ProbeMapRefused) as caught:
        planner.plan_probe_map(made)
    (problem,) = caught.value.problems
    assert problem.path == path and says in str(problem)


def test_a_shared_map_takes_the_place_of_the_programs_own() -> None:
    shared = made_map()
    share = [{"name": "counts", "share": {"probeMap": "conns"}}]
    for spec, elf in (
        (own(maps=share), compiled(program("raw_tp/x"))),
        (own("bcc", "BPF_HASH(counts, u32);", maps=share), None),
    ):
        made = plan(spec, elf, probe_maps={"conns": shared})
        (only,) = made.plan.instance.shared_maps
        assert (only.map, only.probe_map_uid) == ("counts", "map-1")
        assert [each.uid for each in made.probe_maps] == ["map-1"]
        assert hashlib.sha256(shared.elf).hexdigest() in made.objects
        assert "probefleet/maps/map-1/map_map" in made.summary.pins


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": "u64 pid"}, "its key is 4 bytes {0: u32}, the ProbeMap's 8 bytes {0: u64}"),
        ({"value": "struct { u32 a; u32 b; }"}, "the ProbeMap's 8 bytes {0: u32 a, 4: u32 b}"),
        ({"type": "lru-hash"}, "it is of type hash, the ProbeMap of lru-hash"),
        ({"policies": ["other"]}, "does not name slow"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_with_both_layouts(change: Json, says: str) -> None:
    share = [{"name": "counts", "share": {"probeMap": "conns"}}]
    found = refused(own(maps=share), compiled(program("raw_tp/x")), probe_maps={"conns": made_map(**change)})
    assert found[0].path == "spec.maps[0].share.probeMap"
    assert says in found[0].why


KINDS = """#include <probefleet.h>
#define MAP(kind, rest) struct { __uint(type, BPF_MAP_TYPE_##kind); __uint(max_entries, 4); rest }
#define NESTED MAP(ARRAY_OF_MAPS, __type(key, u32); __array(values, struct inner);)
struct inner { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 4); __type(key, u32); __type(value, u64); };
struct inner one SEC(".maps");
MAP(HASH, __type(key, u32); __type(value, u64);) counts SEC(".maps");
NESTED nested SEC(".maps");
NESTED full SEC(".maps") = { .values = { [1] = &one } };
MAP(ARRAY_OF_MAPS, __uint(key_size, 4); __uint(value_size, 4);) bare SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_TASK_STORAGE); __uint(map_flags, BPF_F_NO_PREALLOC); __type(key, s32);
	__type(value, u32); } stored SEC(".maps");
SEC("raw_tp/x") int run(void *ctx) { return 0; }
char LICENSE[] SEC("license") = "GPL";
"""
INNER_HASH = {"type": "hash", "maxEntries": 64, "key": "u32 pid", "value": "u64 n"}
NESTED: Json = {"type": "array-of-maps", "key": None, "value": None, "inner": INNER_HASH}


@pytest.mark.parametrize(
    ("name", "spec", "says"),
    [
        ("nested", NESTED, ""),
        (
            "nested",
            {**NESTED, "inner": {**INNER_HASH, "type": "lru-hash"}},
            "inner maps it is of type hash, the ProbeMap",
        ),
        ("nested", {**NESTED, "inner": {**INNER_HASH, "value": "u32 n"}}, "of its inner maps its value is 8 bytes"),
        ("full", NESTED, "its .values fill it"),
        ("bare", NESTED, "it does not say what its inner maps are"),
        ("stored", {"type": "task-storage", "key": None, "value": "u32 n", "maxEntries": None}, ""),
        ("stored", {"type": "task-storage", "key": None, "value": "u64 n", "maxEntries": None}, "its value is 4 bytes"),
    ],
)
def test_maps_of_maps_and_storage_fit_by_what_is_in_them(name: str, spec: Json, says: str) -> None:
    wanted = own(maps=[{"name": name, "share": {"probeMap": "conns"}}], outputs=[output("counts", "counts")])
    shared = {"conns": made_map(**spec)}
    if not says:
        assert plan(wanted, compiled(KINDS), probe_maps=shared).probe_maps
        return
    (problem,) = refused(wanted, compiled(KINDS), probe_maps=shared)
    assert says in problem.why


def test_values_of_bcc_are_laid_out_by_the_node() -> None:
    values_ = [{"name": "counts", "values": [{"key": 1, "value": 2}]}, {"name": "steps", "values": [{"value": 7}]}]
    source = "BPF_HASH(counts, u32);\nBPF_QUEUE(steps, u64, 8);"
    one, two = (
        plan(own("bcc", source, maps=maps), None).plan.instance
        for maps in (values_, [values_[0], {"name": "steps", "values": [{"value": 8}]}])
    )
    assert [(each.map, each.given) for each in one.contents] == [("counts", "[[1,2]]")]
    assert [(each.map, each.given) for each in one.filled] == [("steps", "[[null,7]]")]
    assert one.digest != two.digest, "what is pushed is part of what runs"


JUMPS = "BPF_PROG_ARRAY(ways, 8);\nint leaf(void *ctx) { return 0; }\nBPF_HASH(counts, u32);"


@pytest.mark.parametrize(
    ("given", "path", "says"),
    [
        ({"map": "way", "entries": {"1": "leaf"}}, "spec.tailCalls[0].map", "Did you mean ways?"),
        ({"map": "ways", "entries": {"8": "leaf"}}, "spec.tailCalls[0].entries.8", "ways has 8 slots"),
        ({"map": "ways", "entries": {"1": "leav"}}, "spec.tailCalls[0].entries.1", "no function of that name"),
    ],
)
def test_jumps_of_bcc_are_checked_as_far_as_its_text_tells(given: Json, path: str, says: str) -> None:
    (problem,) = refused(own("bcc", JUMPS, tailCalls=[given]), None)
    assert problem.path == path and says in str(problem)


def test_a_shared_array_has_the_slots_that_its_probe_map_says() -> None:
    shared = {"conns": made_map(type="prog-array", key=None, value=None, maxEntries=4)}
    share = [{"name": "ways", "share": {"probeMap": "conns"}}]
    jumps = {"map": "ways", "entries": {"3": "leaf"}}
    made = plan(own("bcc", JUMPS, maps=share, tailCalls=[jumps]), None, probe_maps=shared).plan.instance
    assert [(each.map, dict(each.entries)) for each in made.tail_calls] == [("ways", {3: "leaf"})]
    jumps["entries"] = {"4": "leaf"}
    (problem,) = refused(own("bcc", JUMPS, maps=share, tailCalls=[jumps]), None, probe_maps=shared)
    assert "ways has 4 slots" in str(problem)


def test_maps_are_checked_by_name() -> None:
    elf = compiled(program("raw_tp/x"))
    found = refused(own(maps=[{"name": "count", "maxEntries": 4}]), elf)
    assert found[0].write == "Did you mean counts?"
    found = refused(own(maps=[{"name": "counts", "share": {"probeMap": "nope"}}]), elf)
    assert "no ProbeMap of that name" in found[0].why
    ring = [{"name": "ring", "maxEntries": 5000}]
    assert refused(own(maps=ring), compiled(MAPS))[0].write == "Write 8192."


def test_rings_share_whatever_their_records_are() -> None:
    ring = made_map(type="ringbuf", key=None, value=None, maxEntries=4096)
    made = plan(
        own(maps=[{"name": "ring", "share": {"probeMap": "conns"}}]), compiled(MAPS), probe_maps={"conns": ring}
    )
    assert made.probe_maps
    sized = [{"name": "sizes", "share": {"probeMap": "conns"}}]
    assert plan(own(maps=sized), compiled(MAPS), probe_maps={"conns": made_map()}).probe_maps, "fits by size"


def test_objects_that_are_no_probe_map_are_refused() -> None:
    for elf in (b"", compiled(program("raw_tp/x")), made_map(maxEntries=17).elf):
        with pytest.raises(errors.ProbeMapRefused):
            planner.plan_probe_map(planner.CompiledProbeMap(probe_map(), elf))


@pytest.mark.parametrize(
    ("definition", "size"),
    [
        (MapDef("a", MapType.HASH, 4, 8, max_entries=100), 896 + 16 * 128 + 102 * (48 + 8 + 8) + 16),
        (MapDef("a", MapType.PERCPU_HASH, 4, 8, max_entries=100), 896 + 16 * 128 + 100 * 64 + 100 * 8 * 2),
        (MapDef("a", MapType.ARRAY, 4, 12, max_entries=10), 312 + 160),
        (MapDef("a", MapType.PERCPU_ARRAY, 4, 8, max_entries=10), 312 + 10 * 24),
        (MapDef("a", MapType.RINGBUF, max_entries=4096), 584 + 4 * 4096),
        (MapDef("a", MapType.PERF_EVENT_ARRAY, 4, 4), 312 + 16),
        (MapDef("a", MapType.STACK_TRACE, 4, 1016, max_entries=64), 320 + 8 * 64 + 64 * 1032),
        (MapDef("a", MapType.LPM_TRIE, 8, 4, max_entries=2), 312 + 2 * 48),
    ],
)
def test_what_maps_take(definition: MapDef, size: int) -> None:
    """The kernel's own figures are compared in tests/kernel/test_map_types.py."""
    assert map_facts.bytes_of(definition, cpus=2) == size
    assert map_facts.type_name(11) == "lpm-trie" and map_facts.type_name(99) == "type 99"


# Everything together.


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_can_be_planned(path: Path) -> None:
    """Catalog examples need no object here but the probe's own; it is compiled from its source."""
    documents = [each for each in yaml.safe_load_all(path.read_text()) if "probefleet.io" in each["apiVersion"]]
    maps = [policy.parse_probe_map(each) for each in documents if each["kind"] == "ProbeMap"]
    shared = {each.name: planner.CompiledProbeMap(each, compiled(planner.probe_map_source(each))) for each in maps}
    for document in documents:
        if document["kind"] != "ProbePolicy":
            continue
        found = policy.parse_policy(document)
        probes, elf = shipped(), None
        if isinstance(found.program, values.CatalogProgram):
            name = found.program.name
            folder = ROOT / "bpf" / name
            source = (folder / f"{name}.bpf.c").read_text()
            probe = catalog.parse_probe(name, (folder / "probe.yaml").read_text(), compiled(source))
            probes = catalog.Catalog({name: probe})
        elif isinstance(found.program, values.CProgram):
            elf = compiled(found.program.source)
        made = planner.plan(found, catalog=probes, elf=elf, probe_maps=shared, cpus=2)
        assert made.plan.outputs and made.plan.instance.digest


def test_a_program_that_asks_whose_an_address_is_shares_the_built_in_map() -> None:
    text = (ROOT / "examples/connects-by-pod.yaml").read_text()
    found = policy.parse_policy(yaml.safe_load(text))
    assert isinstance(found.program, values.CProgram)
    elf = compiled(found.program.source)
    made = planner.plan(found, catalog=shipped(), elf=elf, probe_maps={}, cpus=2)
    (use,) = made.plan.instance.shared_maps
    assert (use.map, use.probe_map_uid) == ("probefleet_endpoints", "endpoints")
    assert [each.uid for each in made.probe_maps] == ["endpoints"]
    assert made.probe_maps[0].sha256 in made.objects
    assert [each.map for each in made.plan.outputs] == ["connects"]
    assert dict(made.summary.maps)["probefleet_endpoints"] > 65_536 * 24, "counted whole, as every ProbeMap"
    without = catalog.Catalog(shipped().probes)
    with pytest.raises(errors.PolicyRefused, match=r"endpoints.bpf.o, is not where the catalog's objects are"):
        planner.plan(found, catalog=without, elf=elf, probe_maps={}, cpus=2)


def test_plans_are_the_same_every_time() -> None:
    first = plan(own(), compiled(MAPS)).plan.SerializeToString(deterministic=True)
    assert first == plan(own(), compiled(MAPS)).plan.SerializeToString(deterministic=True)


def test_programs_are_named_by_what_the_object_says() -> None:
    assert [each.name for each in BpfObject.parse(compiled(MAPS)).programs] == ["on_switch"]


def test_bccs_leaves_that_are_structs_have_an_output_for_each_number() -> None:
    source = """
    struct value_t { u64 calls, bytes; char name[16]; unsigned long long nanoseconds; struct sock *sk; };
    BPF_HASH(plain, u32, u64);
    BPF_HASH(totals, u32, struct value_t);
    BPF_HASH(sockets, u64, struct sock *);
    """
    made = {each.name: (each.map, each.value) for each in outputs.bcc_outputs(source)}
    assert made == {
        "plain": ("plain", ""),
        "totals_calls": ("totals", "calls"),
        "totals_bytes": ("totals", "bytes"),
        "totals_nanoseconds": ("totals", "nanoseconds"),
    }
