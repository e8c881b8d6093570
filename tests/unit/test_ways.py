"""Which programs are attached: the first way that the kernel has all of, and what is optional where it is there."""

from __future__ import annotations

import pytest
from probefleet_agent import ways
from probefleet_agent.errors import NoSuchTarget, UnsupportedFeature
from probefleet_wire.v1 import plan_pb2


def attachment(program: str, alternative: str = "", way: str = "", *, optional: bool = False) -> plan_pb2.Attachment:
    return plan_pb2.Attachment(program=program, alternative=alternative, way=way, optional=optional)


ALL = (
    attachment("sent_typed", "traffic", "tracepoints"),
    attachment("received_typed", "traffic", "tracepoints"),
    attachment("sent", "traffic", "functions"),
    attachment("received", "traffic", "functions"),
    attachment("received_too", "traffic", "functions", optional=True),
    attachment("always"),
    attachment("spliced", optional=True),
)


def chosen(*absent: str) -> list[str]:
    refusals = [NoSuchTarget(each.program) if each.program in absent else None for each in ALL]
    return [each.program for each in ways.choose(ALL, refusals, "catalog/traffic")]


def test_the_first_way_that_is_whole_is_taken() -> None:
    assert chosen() == ["sent_typed", "received_typed", "always", "spliced"]


def test_a_way_that_lacks_a_member_is_not_taken_at_all() -> None:
    assert chosen("received_typed") == ["sent", "received", "received_too", "always", "spliced"]


def test_what_is_optional_is_left_out_where_it_is_not_there() -> None:
    assert chosen("sent_typed", "received_too", "spliced") == ["sent", "received", "always"]


def test_a_program_without_a_way_is_one_of_its_own() -> None:
    pair = (attachment("typed", "enter"), attachment("raw", "enter"))
    assert [each.program for each in ways.choose(pair, [None, None], "x")] == ["typed"]
    assert [each.program for each in ways.choose(pair, [NoSuchTarget("typed"), None], "x")] == ["raw"]


def test_where_no_way_is_there_each_says_why() -> None:
    reasons = [NoSuchTarget("tracepoint sock_send_length")] * 2 + [UnsupportedFeature("fentry")] * 3
    with pytest.raises(UnsupportedFeature) as error:
        ways.choose(ALL[:5], reasons, "catalog/traffic")
    said = str(error.value)
    assert said.startswith("this kernel has no way for traffic of catalog/traffic: sent_typed, received_typed: ")
    assert "; sent, received: this kernel has no fentry" in said


def test_what_cannot_be_done_without_is_refused_with_its_own_reason() -> None:
    with pytest.raises(NoSuchTarget):
        chosen("always")
