"""What an operator before this one knew and nobody else does, by its last report. Pure.

Counts live in nodes' kernels, and a new operator is told all of them again; but not what nodes counted that have left,
or before a reboot. That was in the total as long as the operator lived, and falls out of it with the next one: so its
report says how much it was (``retired``), and the next one's says that it is gone (``forgotten``). Of a policy that no
node runs any more the report is all there is: the next operator leaves it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

#: Of a report's outputs; written where they are not 0.
FIELDS: Final = ("retired", "forgotten")


@dataclass(frozen=True, slots=True)
class Earlier:
    """``forgotten``: output → what is in no total any more. Of one generation of one policy."""

    generation: int = 0
    forgotten: Mapping[str, int] = field(default_factory=dict)


def of_report(report: Mapping[str, Any]) -> tuple[str, Earlier] | None:
    """The uid of its policy, and what its operator alone knew; None for one in which nothing is counted.

    ``report``: a ProbeReport as the API server has it, so as the CRD's schema allows.
    """
    owners = report.get("metadata", {}).get("ownerReferences", ())
    policies = [owner["uid"] for owner in owners if owner.get("kind") == "ProbePolicy"]
    status = report.get("status") or {}
    outputs = {each["name"]: sum(each.get(name, 0) for name in FIELDS) for each in status.get("outputs", ())}
    forgotten = {name: count for name, count in outputs.items() if count > 0}
    if not policies or "since" not in status:
        return None
    return policies[0], Earlier(status.get("observedGeneration", 0), forgotten)


def words(output: str, count: int) -> str:
    """Among the losses that nobody counts."""
    return f"{output}: {count:,} of nodes that had left, or of before a reboot: only an earlier operator knew them"
