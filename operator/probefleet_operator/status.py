"""A policy's status: what became of it on the nodes. Pure: facts in, the `status` of a ProbePolicy out.

results.py gathers the facts and publishes the outcome. Never a list of nodes: counts, kernel classes and failures
grouped by what went wrong, each bounded. Conditions are Kubernetes' (kstatus reads `Ready` and `observedGeneration`).
"""

from __future__ import annotations

import datetime
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from probefleet_core import placement, values
from probefleet_wire.v1 import stream_pb2

from probefleet_operator import api

MAX_FAILURES = 20
MAX_KERNELS = 20
MAX_FAILURE_KERNELS = 5
MAX_MESSAGE = 2048
MAX_LOG_TAIL = 4096

READY = stream_pb2.PolicyStatus.READY
BROKEN = (stream_pb2.PolicyStatus.FAILED, stream_pb2.PolicyStatus.DETACHED)


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One selected node: its kernel (None: never seen) and what it says of this policy (None: away, or nothing)."""

    name: values.NodeName
    kernel: placement.KernelClass | None
    connected: bool
    said: stream_pb2.PolicyStatus | None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that a status is made from."""

    generation: int
    settled: bool  # planned or refused
    refusal: tuple[str, str] | None  # reason, message
    suspended: bool
    expired: bool
    placed: bool  # placement has decided at least once
    nodes: Sequence[NodeFacts]
    held: Sequence[placement.Held]
    program: str  # "catalog/runqlat"
    coverage: tuple[int, int] | None  # nodes with a fresh sample, nodes selected; None: nothing came yet
    rate: str  # preformatted, "" where unknown
    overhead: str
    cost: api.Json | None


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition before it has a time."""

    type: str
    status: str  # True, False, Unknown
    reason: str
    message: str = ""


def status_of(facts: Facts, *, previous: Iterable[api.Json], now: datetime.datetime) -> api.Json:
    """The whole status; `previous` are the conditions as written last, for their transition times."""
    counts = _count(facts)
    conditions = _conditions(facts, counts)
    word = _word(facts, counts, conditions)
    failures = _failures(facts)
    status: api.Json = {
        "observedGeneration": facts.generation,
        "conditions": timed(conditions, facts.generation, previous, now),
        "columns": {
            "program": facts.program,
            "nodes": f"{counts['ready']}/{counts['desired']}",
            "rate": facts.rate,
            "overhead": facts.overhead,
            "status": word,
            "failure": _failure_column(facts, failures),
        },
        "nodes": dict(counts),
        "kernels": _kernels(facts),
        "failures": failures,
        "summary": _summary(facts, counts, word, failures),
    }
    if facts.cost is not None:
        status["cost"] = facts.cost
    return status


def _count(facts: Facts) -> Mapping[str, int]:
    said = [node.said for node in facts.nodes if node.said is not None]
    current = [each for each in said if each.generation == facts.generation]
    return {
        "desired": len(facts.nodes),
        "updated": sum(each.state == READY for each in current),
        "ready": sum(each.state == READY for each in said),
        "failed": sum(each.state in BROKEN for each in said),
    }


def _conditions(facts: Facts, counts: Mapping[str, int]) -> list[Condition]:
    accepted = _accepted(facts)
    programmed = _programmed(facts, counts)
    reporting = _reporting(facts)
    detached = sum(
        node.said is not None and node.said.state == stream_pb2.PolicyStatus.DETACHED for node in facts.nodes
    )
    budget = (
        Condition("WithinBudget", "False", "OverBudget", f"detached on {detached} nodes: see status.failures")
        if detached
        else Condition("WithinBudget", "True", "WithinBudget")
    )
    conditions = [accepted, programmed, reporting, budget]
    missing = next((each for each in conditions if each.status != "True"), None)
    if facts.suspended and accepted.status == "True":
        ready = Condition("Ready", "True", "Suspended", "spec.suspend is true: no node runs it, its report is kept")
    elif missing is None:
        ready = Condition("Ready", "True", "Reporting")
    else:
        ready = Condition("Ready", "False", missing.reason, missing.message)
    return [*conditions, ready]


def _accepted(facts: Facts) -> Condition:
    if facts.refusal is not None:
        reason, message = facts.refusal
        return Condition("Accepted", "False", reason, cut(message, MAX_MESSAGE))
    if not facts.settled:
        return Condition("Accepted", "Unknown", "Planning", "the program is being compiled and planned")
    return Condition("Accepted", "True", "Planned")


def _programmed(facts: Facts, counts: Mapping[str, int]) -> Condition:
    desired, updated, failed = counts["desired"], counts["updated"], counts["failed"]
    if facts.suspended:
        return Condition("Programmed", "False", "Suspended", "spec.suspend is true")
    if facts.expired:
        return Condition(
            "Programmed", "False", "Expired", "spec.ttl is over: no node runs it any more, its report is kept"
        )
    if not facts.placed:
        return Condition("Programmed", "Unknown", "Placing", "nodes and pods are being listed")
    if not desired:
        return Condition("Programmed", "False", "NoNodes", "no node matches spec.nodes.selector")
    if failed:
        return Condition("Programmed", "False", "NodesFailed", f"{failed} of {desired} nodes: see status.failures")
    if updated < desired:
        away = sum(not node.connected for node in facts.nodes)
        if away and updated + away >= desired:
            return Condition("Programmed", "False", "NodesAway", f"{away} of {desired} nodes have no agent connected")
        return Condition(
            "Programmed", "False", "RollingOut", f"{updated} of {desired} nodes run generation {facts.generation}"
        )
    return Condition("Programmed", "True", "AllNodes", f"{updated} of {desired} nodes")


def _reporting(facts: Facts) -> Condition:
    if facts.coverage is None:
        return Condition("Reporting", "False", "NoSamples", "no node has sent a sample yet")
    fresh, selected = facts.coverage
    if fresh < selected:
        return Condition("Reporting", "False", "Coverage", f"{fresh} of {selected} nodes have a fresh sample")
    return Condition("Reporting", "True", "Coverage", f"{fresh} of {selected} nodes have a fresh sample")


def _word(facts: Facts, counts: Mapping[str, int], conditions: Sequence[Condition]) -> str:
    """What the STATUS column says."""
    by_type = {each.type: each for each in conditions}
    if by_type["Accepted"].status == "False":
        return "Invalid"
    if facts.suspended:
        return "Suspended"
    if facts.expired:
        return "Expired"
    if by_type["Ready"].status == "True":
        return "Ready"
    if counts["failed"] and not counts["ready"]:
        return "Failed"
    if not facts.settled or not facts.placed:
        return "Progressing"
    programmed = by_type["Programmed"]
    if counts["failed"] or programmed.reason in ("NodesAway", "NoNodes") or by_type["WithinBudget"].status == "False":
        return "Degraded"
    if programmed.status == "True" and facts.coverage is not None:
        return "Degraded"
    return "Progressing"


def timed(
    conditions: Iterable[Condition], generation: int, previous: Iterable[api.Json], now: datetime.datetime
) -> list[api.Json]:
    """With transition times: a condition keeps its time as long as its status stays."""
    before = {each.get("type"): each for each in previous}
    timed = []
    for condition in conditions:
        old = before.get(condition.type)
        same = old is not None and old.get("status") == condition.status
        since = old["lastTransitionTime"] if same and old else now.strftime("%Y-%m-%dT%H:%M:%SZ")
        timed.append(
            {
                "type": condition.type,
                "status": condition.status,
                "reason": condition.reason,
                "message": condition.message,
                "observedGeneration": generation,
                "lastTransitionTime": since,
            }
        )
    return timed


def _kernels(facts: Facts) -> list[api.Json]:
    """The kernel matrix: which classes run it."""
    rows: dict[placement.KernelClass, Counter[str]] = defaultdict(Counter)
    for node in facts.nodes:
        if node.kernel is not None:
            row = rows[node.kernel]
            row["nodes"] += 1
            row["ready"] += node.said is not None and node.said.state == READY
            row["failed"] += node.said is not None and node.said.state in BROKEN
            if node.said is not None:  # nodes of one kernel differ in nothing that the verifier looks at
                row["verified"] = max(row["verified"], node.said.verified_instructions)
    largest = sorted(rows.items(), key=lambda item: (-item[1]["nodes"], item[0]))[:MAX_KERNELS]
    return [
        {
            "release": kernel.release,
            "machine": kernel.machine,
            "nodes": row["nodes"],
            "ready": row["ready"],
            "failed": row["failed"],
            **({"verifiedInstructions": row["verified"]} if row["verified"] else {}),
        }
        for kernel, row in largest
    ]


def _failures(facts: Facts) -> list[api.Json]:
    """What went wrong, grouped by reason and message."""
    groups: dict[tuple[str, str], list[tuple[NodeFacts, stream_pb2.PolicyStatus]]] = defaultdict(list)
    for node in facts.nodes:
        if node.said is not None and node.said.state in BROKEN:
            groups[(node.said.reason, node.said.message)].append((node, node.said))
    held = Counter[str]()
    for each in facts.held:
        held[each.reason] += each.waiting
    failures = []
    for (reason, message), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_FAILURES]:
        first, said = min(members, key=lambda member: member[0].name)
        kernels = sorted({node.kernel.release for node, _ in members if node.kernel})[:MAX_FAILURE_KERNELS]
        failure: api.Json = {
            "reason": reason or "Unknown",
            "message": cut(message, MAX_MESSAGE),
            "nodes": len(members),
            "example": first.name,
            "kernels": kernels,
        }
        if held[reason]:
            failure["held"] = held.pop(reason)
        if said.log_tail:
            failure["log"] = said.log_tail[-MAX_LOG_TAIL:]
        failures.append(failure)
    return failures


def _failure_column(facts: Facts, failures: Sequence[api.Json]) -> str:
    """What went wrong, in a word or two."""
    if facts.refusal is not None:
        return facts.refusal[0]
    if not failures:
        return ""
    more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    return cut(f"{failures[0]['reason']} on {failures[0]['nodes']} nodes{more}", 256)


def _summary(facts: Facts, counts: Mapping[str, int], word: str, failures: Sequence[api.Json]) -> list[str]:
    """Lines for `kubectl describe`."""
    lines = [f"{word}: {counts['ready']} of {counts['desired']} nodes run {facts.program}"]
    if facts.refusal is not None:
        lines += [f"refused ({facts.refusal[0]}):", *facts.refusal[1].splitlines()[:12]]
    if facts.coverage is not None:
        lines.append(f"coverage {facts.coverage[0]}/{facts.coverage[1]}")
    for failure in failures[:5]:
        first_line = str(failure["message"]).partition("\n")[0]
        lines.append(f"{failure['nodes']} nodes ({failure['example']}…): {failure['reason']}: {first_line}")
    return [cut(line, 512) for line in lines]


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, with an ellipsis where something is missing."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
