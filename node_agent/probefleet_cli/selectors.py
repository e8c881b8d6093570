"""Label selectors as kubectl's -l takes them in, and as ProbePolicies write them out. Pure."""

from __future__ import annotations

import re
from typing import Any

from probefleet_cli.failures import BadInput

_KEY = r"[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?"
_VALUE = r"[A-Za-z0-9._-]*"
_EQUAL = re.compile(rf"(?P<key>{_KEY})\s*(?P<operator>==|=|!=)\s*(?P<value>{_VALUE})")
_SET = re.compile(rf"(?P<key>{_KEY})\s+(?P<operator>in|notin)\s+\((?P<values>[^()]*)\)")
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
            else:
                labels[found["key"]] = found["value"]
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
