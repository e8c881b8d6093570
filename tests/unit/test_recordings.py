"""What really passed between agents and operator, given to the operator's pure modules again: same answers as then.

tests/recordings has the runs: real programs in a real kernel, real agents, a real operator. Nothing here is made up but
the order in which batches come, and that is drawn.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_core import aggregate, placement, policy, report, values
from probefleet_operator import session, status
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.recordings import frames
from tests.recordings.frames import Entry, Recording

ALL = ["bcc", "events-across-kill", "refused", "shared", "two-nodes"]
NOW = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)
FAILED = stream_pb2.PolicyStatus.FAILED
Batches = list[tuple[Entry, stream_pb2.Batch]]


def test_every_recording_is_read_here() -> None:
    assert frames.names() == ALL
    assert sum((frames.FOLDER / f"{name}.frames").stat().st_size for name in ALL) < 200_000


# From batches to reports.


def plans_of(recording: Recording) -> dict[str, plan_pb2.Plan]:
    """Each policy's newest plan, by its uid."""
    pushed = [plan for _, push in recording.pushes() for plan in push.plans if plan.HasField("instance")]
    return {plan.policy_uid: plan for plan in sorted(pushed, key=lambda plan: plan.generation)}


def name_of(recording: Recording, uid: str) -> aggregate.PodName | None:
    pod = recording.facts["pods"].get(uid)
    return pod and aggregate.PodName(pod["namespace"], pod["name"], "StatefulSet", pod["workload"])


def reports_of(recording: Recording, batches: Batches) -> dict[str, dict[str, Any]]:
    """Policy name → its report's status, as the operator makes it of these batches."""
    hellos, found = recording.hellos(), {}
    end_ns = recording.batches()[-1][0].time_ns
    for uid, plan in plans_of(recording).items():
        merged = aggregate.Aggregate(aggregate.PolicyFacts.of(plan))
        for entry, batch in batches:
            merged.apply(hellos[entry.stream].node, entry.stream, batch, entry.time_ns)
        result = merged.result(
            end_ns,
            selected_nodes={hello.node for hello in hellos.values()},
            names=functools.partial(name_of, recording),
        )
        found[plan.name] = report.status(result)
        assert uid == result.facts.uid
    return found


def totals(body: dict[str, Any], output: str) -> dict[str, int] | int:
    total = next(each["total"] for each in body["outputs"] if each["name"] == output)
    rows = {row["key"][0]: int(row["value"]) for row in total.get("rows", ()) if row["key"]}
    return rows or int(total["value"])


@pytest.mark.parametrize("name", ALL)
def test_totals_are_what_the_workloads_made(name: str) -> None:
    recording = frames.read(name)
    reports = reports_of(recording, recording.batches())
    for policy_name, outputs in recording.facts["expected"].items():
        body = reports[policy_name]
        assert body["columns"]["lost"] == "0"
        for output, expected in outputs.items():
            found = totals(body, output)
            if isinstance(expected, int):
                assert (sum(found.values()) if isinstance(found, dict) else found) == expected
            elif policy_name in ("calls", "healthy"):
                assert found == expected, "nothing of any other pod"
            else:  # the host's other users are there as well
                assert isinstance(found, dict)
                assert {key: found[key] for key in expected} == expected


def test_1020_calls_of_two_nodes_and_two_of_two_are_covered() -> None:
    recording = frames.read("two-nodes")
    body = reports_of(recording, recording.batches())["calls"]
    assert int(body["outputs"][0]["total"]["value"]) == 1020
    assert body["columns"]["coverage"] == "2/2"


def test_records_across_kill_9_are_of_one_epoch_and_two_streams() -> None:
    recording = frames.read("events-across-kill")
    chunks = [(entry.stream, chunk) for entry, batch in recording.batches() for chunk in batch.events]
    assert {stream for stream, _ in chunks} == {1, 2}
    assert len({chunk.epoch for _, chunk in chunks}) == 1
    # What the first agent had sent and not yet given back came a second time: the position knows it.
    sent = [columns.unpack_unsigned(chunk.positions, limit=99) for _, chunk in chunks if chunk.positions]
    assert sum(map(len, sent)) >= 23
    assert len(np.unique(np.concatenate(sent))) == 23
    events = reports_of(recording, recording.batches())["starts"]["outputs"][1]["events"]
    assert {key: int(events[key]) for key in ("received", "lost", "dropped")} == {
        "received": 23,
        "lost": 0,
        "dropped": 0,
    }
    assert sorted(record["arguments"].split()[-1] for record in events["records"]) == sorted(
        str(number) for count in (11, 7, 5) for number in range(count)
    )


@st.composite
def orders(draw: st.DrawFn, recording: Recording) -> Batches:
    """Any order that can be: each node's batches in its own, nodes in any; and anything again at any later time."""
    waiting: dict[str, Batches] = {}
    for each in recording.batches():
        waiting.setdefault(recording.hellos()[each[0].stream].node, []).append(each)
    came: Batches = []
    while any(waiting.values()):
        free = sorted(node for node, left in waiting.items() if left)
        came.append(waiting[draw(st.sampled_from(free))].pop(0))
        if draw(st.booleans()):
            came.append(draw(st.sampled_from(came)))
    return came


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_order_and_repetition_make_no_difference(name: str, data: st.DataObject) -> None:
    recording = frames.read(name)
    drawn = data.draw(orders(recording))
    assert steady(reports_of(recording, drawn)) == steady(reports_as_they_came(name))


@functools.cache
def reports_as_they_came(name: str) -> dict[str, dict[str, Any]]:
    recording = frames.read(name)
    return reports_of(recording, recording.batches())


def steady(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of equal rows, and of records, those that came first may stand first."""
    return {
        name: {
            **body,
            "outputs": [
                {
                    **output,
                    "events": sorted_records(output.get("events", {})),
                    **{part: sorted_rows(output[part]) for part in ("window", "total")},
                }
                for output in body["outputs"]
            ],
        }
        for name, body in reports.items()
    }


def sorted_rows(part: dict[str, Any]) -> dict[str, Any]:
    return {**part, "rows": sorted(part.get("rows", ()), key=lambda row: row["key"])}


def sorted_records(events: dict[str, Any]) -> dict[str, Any]:
    return {**events, "records": sorted(events.get("records", ()), key=lambda record: sorted(record.items()))}


@pytest.mark.parametrize("name", ALL)
def test_a_stream_whose_first_rows_never_came_has_to_begin_anew(name: str) -> None:
    """Instead of being summed up wrongly."""
    recording = frames.read(name)
    for uid, plan in plans_of(recording).items():
        later = [
            each
            for each in recording.batches()
            if any(table.policy_uid == uid and table.first_new_row and table.new_rows for table in each[1].tables)
        ]
        for entry, batch in later:
            merged = aggregate.Aggregate(aggregate.PolicyFacts.of(plan))
            with pytest.raises(aggregate.ResyncNeeded):
                merged.apply("node", entry.stream, batch, entry.time_ns)


# From policies and statuses to pushes.


def policies_of(recording: Recording) -> dict[tuple[str, int], values.ProbePolicy]:
    """(uid, generation) → the policy as it was applied."""
    raw = [each for each in recording.facts["objects"] if each["kind"] == "ProbePolicy"]
    return {(each["metadata"]["uid"], each["metadata"]["generation"]): policy.parse_policy(each) for each in raw}


def candidates_of(recording: Recording, plans: Iterable[plan_pb2.Plan]) -> list[placement.Candidate]:
    parsed = policies_of(recording)
    maps = {each.uid: each for _, push in recording.pushes() for each in push.probe_maps}
    return [
        placement.Candidate(
            values.PolicyUid(plan.policy_uid),
            plan.namespace,
            plan.name,
            parsed[plan.policy_uid, plan.generation],
            plan,
            tuple(maps[each.probe_map_uid] for each in plan.instance.shared_maps),
        )
        for plan in plans
    ]


def nodes_of(recording: Recording, said: dict[int, stream_pb2.Status] | None) -> list[placement.Node]:
    """Nodes with an agent; `said` by stream, None: nothing runs yet."""
    return [
        placement.Node(
            name=values.NodeName(hello.node),
            labels=recording.facts["nodes"][hello.node],
            ready=True,
            connected=True,
            kernel=session.kernel_class(hello),
            running={} if said is None else running_of(said.get(stream)),
        )
        for stream, hello in {hello.node: (stream, hello) for stream, hello in recording.hellos().items()}.values()
    ]


def running_of(said: stream_pb2.Status | None) -> dict[values.PolicyUid, stream_pb2.PolicyStatus] | None:
    return said and {values.PolicyUid(each.policy_uid): each for each in said.policies}


def pods_of(recording: Recording) -> list[placement.Pod]:
    return [
        placement.Pod(values.PodUid(uid), pod["namespace"], {}, values.NodeName(pod["node"]))
        for uid, pod in recording.facts["pods"].items()
    ]


def placed(
    recording: Recording, plans: Iterable[plan_pb2.Plan], said: dict[int, stream_pb2.Status] | None, **more: Any
) -> placement.Placement:
    made = placement.place(
        candidates=candidates_of(recording, plans),
        nodes=nodes_of(recording, said),
        pods=pods_of(recording),
        previous=more.get("previous", {}),
        now_ns=recording.entries[0].time_ns,
        complete=True,
    )
    assert made is not None
    for state in made.nodes.values():
        for selection in state.selections:
            selection.ClearField("selector")  # frames that were recorded before have none
    return made


def state_of(push: stream_pb2.Push) -> placement.NodeState:
    for selection in push.selections:
        selection.ClearField("selector")
    return placement.NodeState(tuple(push.plans), tuple(push.probe_maps), tuple(push.selections))


@dataclasses.dataclass
class Moment:
    """What had been said when the operator pushed."""

    stream: int
    push: stream_pb2.Push
    said: dict[int, stream_pb2.Status]  # by stream, the newest
    told: dict[values.NodeName, placement.NodeState]  # by node, before


def moments(recording: Recording) -> Iterator[Moment]:
    said: dict[int, stream_pb2.Status] = {}
    told: dict[values.NodeName, placement.NodeState] = {}
    hellos = recording.hellos()
    for entry, message in recording.messages():
        if message.WhichOneof("message") == "status":
            said[entry.stream] = message.status
        elif message.WhichOneof("message") == "push":
            yield Moment(entry.stream, message.push, dict(said), dict(told))
            told[values.NodeName(hellos[entry.stream].node)] = state_of(message.push)


@pytest.mark.parametrize("name", ALL)
def test_what_was_pushed_last_before_the_end_is_what_is_placed_now(name: str) -> None:
    """All policies planned, all agents' answers known: the same plans, maps and selections for every node."""
    recording = frames.read(name)
    plans = plans_of(recording)
    whole: dict[str, Moment] = {}
    for moment in moments(recording):
        if {plan.policy_uid: plan.generation for plan in moment.push.plans} == {
            uid: plan.generation for uid, plan in plans.items()
        }:
            whole[recording.hellos()[moment.stream].node] = moment
    assert set(whole) == {hello.node for hello in recording.hellos().values()}
    for node, moment in whole.items():
        made = placed(recording, plans.values(), moment.said)
        assert made.nodes[values.NodeName(node)] == state_of(moment.push)
        here = sorted(pod.uid for pod in pods_of(recording) if pod.node == node)
        assert list(moment.push.known_pod_uids) == here


@pytest.mark.parametrize("name", ALL)
def test_the_first_push_gives_a_new_program_to_one_node(name: str) -> None:
    recording = frames.read(name)
    first = next(moment for moment in moments(recording) if moment.push.plans)
    made = placed(recording, [plan for plan in first.push.plans if plan.HasField("instance")], None)
    node = values.NodeName(recording.hellos()[first.stream].node)
    assert made.nodes[node] == state_of(first.push)
    others = {each for each, state in made.nodes.items() if each != node and state.plans}
    assert not others, "the rest of the kernel's class waits"


@pytest.mark.parametrize("name", ALL)
def test_without_policies_the_last_push_is_empty(name: str) -> None:
    recording = frames.read(name)
    last = {moment.stream: moment for moment in moments(recording)}
    for node in {hello.node for hello in recording.hellos().values()}:
        stream = max(stream for stream, hello in recording.hellos().items() if hello.node == node)
        assert state_of(last[stream].push) == placement.NodeState() == placed(recording, [], None).nodes[node]


def refused_moment() -> tuple[Recording, Moment, dict[str, plan_pb2.Plan]]:
    """When the verifier had said no, and the policies as they were then."""
    recording = frames.read("refused")
    said: dict[int, stream_pb2.Status] = {}
    told: dict[values.NodeName, placement.NodeState] = {}
    plans: dict[str, plan_pb2.Plan] = {}
    for entry, message in recording.messages():
        if message.WhichOneof("message") == "push":
            plans |= {plan.name: plan for plan in message.push.plans}
            told[values.NodeName(recording.hellos()[entry.stream].node)] = state_of(message.push)
        elif message.WhichOneof("message") == "status":
            said[entry.stream] = message.status
            if any(each.state == FAILED for each in message.status.policies):
                return recording, Moment(entry.stream, stream_pb2.Push(), said, told), plans
    raise AssertionError("nothing failed in this recording")


def test_a_refused_program_is_held_and_its_neighbour_stays() -> None:
    recording, moment, plans = refused_moment()
    made = placed(recording, plans.values(), moment.said, previous=moment.told)
    (held,) = made.held
    failed_on = recording.hellos()[moment.stream].node
    assert (held.node, held.reason, held.waiting) == (failed_on, "VerifierRefused", 1)
    names = {node: sorted(plan.name for plan in state.plans) for node, state in made.nodes.items()}
    assert {tuple(each) for node, each in names.items() if node != failed_on} == {("healthy",)}
    assert names[values.NodeName(failed_on)] == ["broken", "healthy"]


def test_a_refused_programs_status_says_line_and_log() -> None:
    recording, moment, plans = refused_moment()
    made = placed(recording, plans.values(), moment.said, previous=moment.told)
    uid = values.PolicyUid(plans["broken"].policy_uid)
    facts = status.Facts(
        generation=1,
        settled=True,
        refusal=None,
        suspended=False,
        expired=False,
        placed=True,
        nodes=[
            status.NodeFacts(
                name=values.NodeName(hello.node),
                kernel=session.kernel_class(hello),
                connected=True,
                said={each.policy_uid: each for each in moment.said[stream].policies}.get(uid),
            )
            for stream, hello in recording.hellos().items()
        ],
        held=[each for each in made.held if each.policy == uid],
        program="c/broken",
        coverage=None,
        rate="",
        overhead="",
        cost=None,
    )
    body = status.status_of(facts, previous=(), now=NOW)
    (failure,) = body["failures"]
    assert (failure["nodes"], failure["held"], failure["reason"]) == (1, 1, "VerifierRefused")
    assert "count may be null. Test the pointer first." in failure["message"]
    assert "invalid mem access 'map_value_or_null'" in failure["log"]
    assert body["columns"]["status"] == "Failed"
    assert body["nodes"] == {"desired": 2, "updated": 0, "ready": 0, "failed": 1}
