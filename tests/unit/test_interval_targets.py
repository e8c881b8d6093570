"""Iterators and syscall programs: what SEC() and a policy say of them, and what outputs may make of an iterator."""

from __future__ import annotations

from typing import Any

import pytest
from probefleet_core import catalog, errors, interval_targets, planner, policy, to_wire
from probefleet_core.interval_targets import Interval, Iterator, Target

from tests.bpf_c import compiled

SOURCE = """
#include <probefleet.h>
struct row { u32 state; port_t port; cgroup_id_t cgroup; comm_t name; };
const struct row *unused __attribute__((unused));
SEC("iter/tcp") int dump(struct bpf_iter__tcp *ctx)
{
	struct row row = {};

	bpf_seq_write(ctx->meta->seq, &row, sizeof(row));
	return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""
TICKS = """
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
ticks SEC(".maps");
SEC("syscall") int tick(void *ctx) { u32 zero = 0; probefleet_add(&ticks, &zero, 1); return 0; }
"""
ROW = {"map": "dump", "record": "struct row"}


def planned(*outputs: dict[str, Any], source: str = SOURCE, **spec: Any) -> planner.Planned:
    given = {
        "apiVersion": policy.API_VERSION,
        "kind": "ProbePolicy",
        "metadata": {"name": "now"},
        "spec": {"scope": "Cluster", "program": {"c": {"source": source}}, "outputs": list(outputs), **spec},
    }
    parsed = policy.parse_policy(given)
    return planner.plan(parsed, catalog=catalog.Catalog({}), elf=compiled(source), probe_maps={})


def refused(*outputs: dict[str, Any], **spec: Any) -> str:
    with pytest.raises(errors.Refused) as caught:
        planned(*outputs, **spec)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "fits", "target"),
    [
        ("iter/task", "iterator", Iterator("task")),
        ("iter.s/bpf_map", "iterator", Iterator("bpf_map")),
        ("?iter", "iterator", None),
        ("syscall", "interval", Interval()),
    ],
)
def test_sections_mean_what_libbpf_says(section: str, fits: str, target: Target | None) -> None:
    assert interval_targets.read_section(section) == ((fits,), target)


@pytest.mark.parametrize("section", ["iterate", "ksyscall/read", "kprobe/iter"])
def test_other_sections_are_left_alone(section: str) -> None:
    assert interval_targets.read_section(section) is None


def test_lines_are_the_output_of_an_iterator_that_says_nothing_else() -> None:
    made = planned()
    (output,) = made.plan.outputs
    assert (output.map, output.kind, output.record) == ("dump", output.EVENTS, "")
    (attachment,) = made.plan.instance.attachments
    assert (attachment.iterator.type, attachment.iterator.record) == ("tcp", "")
    assert made.summary.programs == ("dump: iterator tcp",)


def test_a_gauge_groups_by_the_records_fields_and_the_node_hears_its_type() -> None:
    made = planned(
        {"name": "states", "from": ROW, "gauge": {"merge": "sum"}, "groupBy": ["node", "key.state", "pod"]},
        {"name": "ports", "from": {**ROW, "value": "port"}, "gauge": {"merge": "max"}},
    )
    (attachment,) = made.plan.instance.attachments
    assert attachment.iterator.record == "row"
    assert [list(output.group_by) for output in made.plan.outputs] == [["node", "key.state", "pod"], []]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ({"from": {"map": "dump"}, "counter": {}}, "counter of an iterator: a reading shows what is there"),
        ({"from": {"map": "dump"}, "gauge": {"merge": "sum"}}, "a gauge needs rows of a known type"),
        (
            {"from": {"map": "dump", "record": "struct raw"}, "events": {}},
            '"raw": the program has no struct of that name',
        ),
        ({"from": {**ROW, "value": "name"}, "gauge": {"merge": "sum"}}, '"name": row has no number of that name'),
        ({"from": ROW, "gauge": {"merge": "sum"}, "groupBy": ["key.stat"]}, "Did you mean key.state"),
    ],
)
def test_what_an_iterator_cannot_be_is_said(output: dict[str, Any], words: str) -> None:
    assert words in refused({"name": "now", **output})


def test_an_iterator_writes_records_of_one_kind() -> None:
    found = refused(
        {"name": "rows", "from": ROW, "events": {}}, {"name": "lines", "from": {"map": "dump"}, "events": {}}
    )
    assert "lines and row of dump" in found


def test_without_an_identity_there_are_no_pods() -> None:
    source = SOURCE.replace("cgroup_id_t cgroup; ", "")
    gauge = {"name": "now", "from": ROW, "gauge": {"merge": "sum"}}
    assert "the record does not say whose it is" in refused({**gauge, "groupBy": ["pod"]}, source=source)
    pods = {"selector": {"matchLabels": {"app": "web"}}}
    assert "does not say whose event it is" in refused(gauge, source=source, pods=pods)


def test_a_syscall_program_runs_each_interval_for_its_maps() -> None:
    made = planned(source="#include <probefleet.h>" + TICKS + 'char LICENSE[] SEC("license") = "GPL";')
    (attachment,) = made.plan.instance.attachments
    assert attachment.WhichOneof("target") == "interval"
    assert made.summary.programs == ("tick: interval (once each)",)
    assert to_wire.kind_of(Interval()) == "interval"


def test_a_policy_can_say_what_an_iterator_walks_over() -> None:
    made = planned(source=SOURCE.replace("iter/tcp", "iter"), attach=[{"program": "dump", "iterator": {"type": "tcp"}}])
    assert made.plan.instance.attachments[0].iterator.type == "tcp"
