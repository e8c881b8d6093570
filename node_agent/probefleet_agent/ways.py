"""Which programs of an instance are attached on this kernel. Pure: attachments, and why each cannot be, in; some out.

``execute`` asks before it loads. Attachments of one ``alternative`` are ways to the same end, of which the first is
taken whose members the kernel all has. A way is one program, unless several say the same ``way``. What is ``optional``
is left out where the kernel has no such place: where nothing is then missing, or the probe's README says what.
"""

from __future__ import annotations

from collections.abc import Sequence

from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import NoSuchTarget, UnsupportedFeature

Refusal = UnsupportedFeature | NoSuchTarget | None


def choose(
    attachments: Sequence[plan_pb2.Attachment], refusals: Sequence[Refusal], title: str
) -> list[plan_pb2.Attachment]:
    """Those to attach, in the plan's order; the refusal of the first that cannot be done without."""
    taken: dict[str, str] = {}
    failures: dict[str, dict[str, list[str]]] = {}
    for group, way in dict.fromkeys(_way(each) for each in attachments if each.alternative):
        whole, reasons = True, failures.setdefault(group, {})
        for each, refusal in zip(attachments, refusals, strict=True):
            if _way(each) == (group, way) and refusal is not None and not each.optional:
                whole = False
                reasons.setdefault(str(refusal), []).append(each.program)
        if whole:
            taken.setdefault(group, way)
    chosen = []
    for each, refusal in zip(attachments, refusals, strict=True):
        if each.alternative and taken.get(each.alternative) != _way(each)[1]:
            continue
        if refusal is None:
            chosen.append(each)
        elif not each.optional:
            raise refusal
    for group, reasons in failures.items():
        if group not in taken:
            words = [f"{', '.join(programs)}: {reason}" for reason, programs in reasons.items()]
            raise UnsupportedFeature(f"way for {group} of {title}", why="; ".join(words))
    return chosen


def _way(attachment: plan_pb2.Attachment) -> tuple[str, str]:
    return attachment.alternative, attachment.way or attachment.program
