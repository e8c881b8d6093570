"""What agents decided, numbered and decoded in real runs: the agent's pure modules must say it again.

In: tests/recordings, with what their maps and rings held. The wire's frames that were sent are the right answer.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from probefleet_agent import collect, pods, reconcile, samples
from probefleet_agent.decode import Layout
from probefleet_agent.pods import PodUid, PolicyUid
from probefleet_agent.reconcile import Digest, MapUid
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.recordings import frames
from tests.recordings.frames import Recording

ALL = frames.names()
FAILED = stream_pb2.PolicyStatus.FAILED


@pytest.mark.parametrize("name", ALL)
def test_reconcile_comes_to_what_the_agents_said(name: str) -> None:
    """Every push, on a node where actions do what they say, except those that the kernel then refused."""
    recording = frames.read(name)
    nodes: dict[str, reconcile.Observed] = {}
    pushes: dict[tuple[int, int], stream_pb2.Push] = {}
    checked = 0
    for entry, message in recording.messages():
        node = recording.hellos()[entry.stream].node
        if message.WhichOneof("message") == "push":
            pushes[entry.stream, message.push.version] = message.push
        elif message.WhichOneof("message") == "status" and (entry.stream, message.status.version) in pushes:
            push = pushes[entry.stream, message.status.version]
            failed = {
                plan.instance.digest
                for plan in push.plans
                for each in message.status.policies
                if each.policy_uid == plan.policy_uid and each.state == FAILED
            }
            nodes[node] = observed = carried_out(push, nodes.get(node, reconcile.Observed()), failed)
            assert dict(observed.bindings) == {
                each.policy_uid: each.digest for each in message.status.policies if each.digest
            }
            assert observed.maps == {each.uid for each in message.status.probe_maps}
            checked += 1
    assert checked >= 2
    assert all(each == reconcile.Observed() for each in nodes.values()), "in the end nothing is left"


def carried_out(push: stream_pb2.Push, observed: reconcile.Observed, refused: set[str]) -> reconcile.Observed:
    """What a node has after a push."""
    wanted = {
        PolicyUid(plan.policy_uid): reconcile.Wanted(
            Digest(plan.instance.digest) if plan.HasField("instance") else None,
            frozenset(MapUid(each.probe_map_uid) for each in plan.instance.shared_maps),
        )
        for plan in push.plans
    }
    desired = reconcile.Desired(wanted, frozenset(MapUid(each.uid) for each in push.probe_maps))
    instances, bindings, maps = dict(observed.instances), dict(observed.bindings), set(observed.maps)
    failed: set[Digest] = set()
    while True:
        now = reconcile.Observed(dict(instances), dict(bindings), frozenset(maps), frozenset(failed))
        actions = reconcile.reconcile(desired, now)
        if not actions:
            return dataclasses.replace(now, failed=frozenset())
        for action in actions:
            match action:
                case reconcile.MakeMap(uid):
                    maps.add(uid)
                case reconcile.Load(digest) if digest in refused:
                    failed.add(digest)
                case reconcile.Load(digest):
                    instances[digest] = next(each.maps for each in wanted.values() if each.digest == digest)
                case reconcile.Bind(uid, digest):
                    bindings[uid] = digest
                case reconcile.Unbind(uid):
                    del bindings[uid]
                case reconcile.Remove(digest):
                    del instances[digest]
                case reconcile.RemoveMap(uid):
                    maps.remove(uid)


@pytest.mark.parametrize("name", ALL)
def test_numbers_and_acknowledgements_are_those_of_a_stream(name: str) -> None:
    streams: dict[int, samples.Stream] = {}
    for entry, message in frames.read(name).messages():
        stream = streams.setdefault(entry.stream, samples.Stream())
        if message.WhichOneof("message") == "batch":
            assert message.batch.sequence == stream.number([])
            # A push is preceded by one more batch, whatever the window says.
            assert stream.sequence - stream.acknowledged <= samples.WINDOW + 1
        elif message.WhichOneof("message") == "ack":
            stream.acknowledge(message.ack.sequence)
    assert all(stream.sequence == stream.acknowledged for stream in streams.values() if stream is not None)


# From the kernel's bytes to the frames.


class Answers:
    """What the machine said while it was recorded."""

    machine = "x86_64"

    def __init__(self) -> None:
        self.wall_minus_ktime_ns = 0
        self.said: dict[str, str] = {}

    def command(self, pid: int) -> str:
        return self.said[f"command {pid}"]

    def learn(self, pid: int, command: str) -> None:
        pass

    def user(self, uid: int) -> str:
        return self.said[f"user {uid}"]

    def device(self, number: int) -> str:
        return self.said[f"device {number}"]

    def function(self, address: int) -> str:
        return self.said[f"function {address}"]


class Process:
    """One agent's readers, fed with what its maps and rings held."""

    def __init__(self) -> None:
        self.book = pods.Book()
        self.answers = Answers()
        self.tables: dict[int, collect.TableReader] = {}
        self.events: dict[int, collect.EventReader] = {}

    def replay(self, line: dict[str, Any]) -> stream_pb2.Table | stream_pb2.EventChunk | None:
        """Do one thing again; the message that came of it, with policy and output."""
        match line["did"]:
            case "learn":
                self.book.root = line["root"]
                self.book.learn({pods.CgroupId(int(number)): path for number, path in line["paths"].items()})
            case "select":
                chosen = {
                    PolicyUid(uid): pods.Selected(everything, frozenset(map(PodUid, uids)))
                    for uid, (everything, uids) in line["selections"].items()
                }
                self.book.select(chosen, line["known"])
            case "restart":
                if line["rows"] in self.tables:  # else it had read nothing yet
                    self.tables[line["rows"]].rows.restart_stream()
            case "rows":
                return self._rows(line)
            case "chunk":
                return self._chunk(line)
        return None

    def _rows(self, line: dict[str, Any]) -> stream_pb2.Table:
        plan, output, layout = self._made_from(line)
        reader = self.tables.setdefault(
            line["rows"], collect.TableReader(plan, output, layout, self.book, self.answers, None)
        )
        reader.read(unpacked(line["keys"]), unpacked(line["values"]))
        table = reader.rows.table() or stream_pb2.Table(
            rows=columns.pack(np.zeros(0, np.uint32)), values=columns.pack(np.zeros(0, np.uint64)), width=1
        )
        table.policy_uid, table.output = plan.policy_uid, output.name
        return table

    def _chunk(self, line: dict[str, Any]) -> stream_pb2.EventChunk:
        plan, output, layout = self._made_from(line)
        reader = self.events.setdefault(
            line["reader"],
            collect.EventReader(
                plan, output, layout, self.book, self.answers, samples.Mark(line["cursor"], None, line["dropped"])
            ),
        )
        reader.cursor = line["cursor"]
        made = reader.chunk(unpacked(line["records"]), unpacked(line["positions"]), line["end"], line["now_ns"])
        assert made is not None
        made.policy_uid, made.output = plan.policy_uid, output.name
        return made

    def _made_from(self, line: dict[str, Any]) -> tuple[plan_pb2.Plan, plan_pb2.Output, Layout]:
        plan = plan_pb2.Plan.FromString(base64.b64decode(line["plan"]))
        output = next(each for each in plan.outputs if each.name == line["output"])
        self.answers.wall_minus_ktime_ns, self.answers.said = line["wall_minus_ktime_ns"], line["answers"]
        return plan, output, Layout.from_json(line["layout"])


def unpacked(array: dict[str, Any]) -> Any:
    return np.frombuffer(bytes.fromhex(array["hex"]), array["dtype"]).reshape(array["shape"]).copy()


def sent_by(recording: Recording, process: int) -> Iterator[stream_pb2.Table | stream_pb2.EventChunk]:
    """Tables and chunks of the process's stream: each agent of a recording has had one."""
    root = next(line["root"] for line in recording.readings()[process] if line["did"] == "learn")
    node = root.rpartition("/")[2]
    same = [number for number, lines in sorted(recording.readings().items()) if lines[0]["root"] == root]
    streams = [stream for stream, hello in recording.hellos().items() if hello.node == node]
    for entry, batch in recording.batches():
        if entry.stream == streams[same.index(process)]:
            yield from batch.tables
            yield from batch.events


def empty(sent: stream_pb2.Table | stream_pb2.EventChunk) -> bool:
    """A chunk without records: the engine sends one without a reading, so that its counters come."""
    return isinstance(sent, stream_pb2.EventChunk) and len(sent.positions) <= 1


TABLE_PARTS = ("first_new_row", "new_rows", "keys", "rows", "width", "values")
CHUNK_PARTS = ("positions", "end_position", "columns", "dropped")


@pytest.mark.parametrize("name", ALL)
def test_the_kernels_bytes_become_the_same_frames(name: str) -> None:
    recording = frames.read(name)
    compared = 0
    for number, lines in recording.readings().items():
        process = Process()
        made = [found for line in lines if (found := process.replay(line)) is not None]
        for kind, parts in ((stream_pb2.Table, TABLE_PARTS), (stream_pb2.EventChunk, CHUNK_PARTS)):
            expected = [each for each in sent_by(recording, number) if isinstance(each, kind) and not empty(each)]
            got = [each for each in made if isinstance(each, kind) and not empty(each)]
            # What was read when the process was killed was perhaps not sent.
            assert len(expected) <= len(got) <= len(expected) + 1
            for one, other in zip(expected, got, strict=False):
                assert (one.policy_uid, one.output) == (other.policy_uid, other.output)
                for part in parts:
                    assert getattr(one, part) == getattr(other, part), part
                compared += 1
    assert compared >= 3
