"""A ProbeMap's status: who uses it, which nodes have it, what went wrong. Pure, the sister of status.py."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from probefleet_core import format as humane
from probefleet_core import values
from probefleet_wire.v1 import stream_pb2

from probefleet_operator import api, status

MAX_POLICIES = 64


@dataclass(frozen=True, slots=True)
class MapFacts:
    """Everything that a ProbeMap's status is made from. `said`: what each node that needs it says (None: nothing)."""

    generation: int
    settled: bool
    refusal: tuple[str, str] | None
    policies: Sequence[str]
    max_entries: int
    said: Mapping[values.NodeName, stream_pb2.MapStatus | None]


def status_of(facts: MapFacts, *, previous: Iterable[api.Json], now: datetime.datetime) -> api.Json:
    """The whole status; `previous` are the conditions as written last."""
    there = [each for each in facts.said.values() if each is not None]
    ready = sum(_has_it(each, facts) for each in there)
    failed = sum(bool(each.reason) for each in there)
    desired = len(facts.said)
    largest = max((each.bytes for each in there), default=0)
    accepted = _accepted(facts)
    made = _made(facts, desired=desired, ready=ready, failed=failed)
    missing = next((each for each in (accepted, made) if each.status != "True"), None)
    overall = (
        status.Condition("Ready", "False", missing.reason, missing.message)
        if missing is not None
        else status.Condition("Ready", "True", made.reason)
    )
    word = _word(facts, accepted, made)
    failures = _failures(facts)
    users = f"{len(facts.policies)} policies" if len(facts.policies) != 1 else "1 policy"
    return {
        "observedGeneration": facts.generation,
        "conditions": status.timed((accepted, made, overall), facts.generation, previous, now),
        "columns": {"nodes": f"{ready}/{desired}", "users": str(len(facts.policies)), "status": word},
        "policies": sorted(facts.policies)[:MAX_POLICIES],
        "nodes": {"desired": desired, "ready": ready, "failed": failed},
        "bytes": largest,
        "failures": failures,
        "summary": [
            f"{word}: used by {users}; {ready} of {desired} nodes have it, {humane.size(largest)} on the largest",
            *[f"{each['nodes']} nodes ({each['example']}…): {each['reason']}" for each in failures[:5]],
        ],
    }


def _has_it(said: stream_pb2.MapStatus, facts: MapFacts) -> bool:
    """Is it there, as large as it is to be? An agent that is older than growing says no size."""
    return said.kernel_map_id != 0 and not said.reason and (said.max_entries or facts.max_entries) >= facts.max_entries


def _accepted(facts: MapFacts) -> status.Condition:
    if facts.refusal is not None:
        return status.Condition("Accepted", "False", facts.refusal[0], status.cut(facts.refusal[1], status.MAX_MESSAGE))
    if not facts.settled:
        return status.Condition("Accepted", "Unknown", "Planning", "the declaration is being compiled")
    return status.Condition("Accepted", "True", "Planned")


def _made(facts: MapFacts, *, desired: int, ready: int, failed: int) -> status.Condition:
    if failed:
        return status.Condition(
            "Programmed", "False", "NodesFailed", f"{failed} of {desired} nodes: see status.failures"
        )
    if ready < desired:
        return status.Condition("Programmed", "False", "RollingOut", f"{ready} of {desired} nodes have it")
    return status.Condition("Programmed", "True", "AllNodes" if desired else "Unused", f"{ready} of {desired} nodes")


def _word(facts: MapFacts, accepted: status.Condition, made: status.Condition) -> str:
    if accepted.status == "False":
        return "Invalid"
    if not facts.policies:
        return "Unused"
    if made.reason == "NodesFailed":
        return "Degraded"
    return "Ready" if accepted.status == made.status == "True" else "Progressing"


def _failures(facts: MapFacts) -> list[api.Json]:
    groups: dict[tuple[str, str], list[values.NodeName]] = defaultdict(list)
    for node, each in facts.said.items():
        if each is not None and each.reason:
            groups[(each.reason, each.message)].append(node)
    largest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[: status.MAX_FAILURES]
    return [
        {
            "reason": reason,
            "message": status.cut(message, status.MAX_MESSAGE),
            "nodes": len(nodes),
            "example": min(nodes),
        }
        for (reason, message), nodes in largest
    ]
