"""Label selectors as kubectl's -l takes them in, and as ProbePolicies write them out; and ``run``'s choice. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from probefleet_core import values

from probefleet_cli.failures import BadInput

_KEY = r"[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?"
_VALUE = r"[A-Za-z0-9._-]*"
_EQUAL = re.compile(rf"(?P<key>{_KEY})\s*(?P<operator>==|=|!=)\s*(?P<value>{_VALUE})")
_SET = re.compile(rf"(?P<key>{_KEY})\s+(?P<operator>in|notin)\s*\((?P<values>[^()]*)\)")
_EXISTS = re.compile(rf"(?P<not>!?)\s*(?P<key>{_KEY})")
_COMMA = re.compile(r",(?![^()]*\))")


def parse(text: str) -> dict[str, Any]:
    """``app=web,tier in (a,b),!old`` → matchLabels and matchExpressions; BadInput where it is none."""
    labels: dict[str, str] = {}
    expressions: list[dict[str, Any]] = []
    for part in (part.strip() for part in _COMMA.split(text)):
        if found := _EQUAL.fullmatch(part):
            if found["operator"] == "!=":
                expressions.append({"key": found["key"], "operator": "NotIn", "values": [found["value"]]})
            elif labels.setdefault(found["key"], found["value"]) != found["value"]:
                # Two values of one key, which no pod has: a map would keep one of them.
                expressions.append({"key": found["key"], "operator": "In", "values": [found["value"]]})
        elif found := _SET.fullmatch(part):
            values = [value.strip() for value in found["values"].split(",")]
            operator = "In" if found["operator"] == "in" else "NotIn"
            expressions.append({"key": found["key"], "operator": operator, "values": values})
        elif found := _EXISTS.fullmatch(part):
            expressions.append({"key": found["key"], "operator": "DoesNotExist" if found["not"] else "Exists"})
        else:
            raise BadInput(
                f"-l {text}: {part!r} is no requirement. Write app=web, tier!=db, 'tier in (a,b)', key or !key"
            )
    selector: dict[str, Any] = {}
    if labels:
        selector["matchLabels"] = labels
    if expressions:
        selector["matchExpressions"] = expressions
    return selector


def selector(text: str) -> values.Selector:
    """The same, as the core has it."""
    found = parse(text)
    return values.Selector(
        match_labels=tuple(sorted(found.get("matchLabels", {}).items())),
        match_expressions=tuple(
            values.Requirement(each["key"], values.Operator(each["operator"]), tuple(each.get("values", ())))
            for each in found.get("matchExpressions", ())
        ),
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """``run -n NAMESPACE -l LABELS``: which pods, whatever the policies say. ``words`` is how it was written."""

    namespace: str = ""
    labels: values.Selector | None = None
    words: str = ""

    @classmethod
    def of(cls, namespace: str | None, labels: str | None) -> Choice:
        """What the options say; BadInput where -l is no selector."""
        words = [f"-n {namespace}" if namespace else "", f"-l {labels}" if labels is not None else ""]
        return cls(
            namespace or "", None if labels is None else selector(labels), " ".join(word for word in words if word)
        )

    def __bool__(self) -> bool:
        return bool(self.words)

    def narrow(self, policy: values.ProbePolicy) -> values.ProbePolicy:
        """The policy, of these pods only: what it asks of their labels, and what -l asks."""
        if not self:
            return policy
        own, more = policy.pods or values.Selector(), self.labels or values.Selector()
        both = values.Selector(own.match_labels + more.match_labels, own.match_expressions + more.match_expressions)
        return replace(policy, pods=both)
