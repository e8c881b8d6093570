"""Records on a terminal: as much as fits, and nothing that says the same twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from probefleet_cli import event_table, render

RECORD = {
    "time": "2026-11-23T13:23:27.356413Z",
    "node": "node1",
    "namespace": "shop",
    "workload": "web",
    "pod": "web-1",
    "container": "nginx",
    "pid": "sleep[3978]",
    "command": "sleep",
    "file": "/usr/lib/very/long/way/to/sleep",
    "arguments": "sleep " + "x" * 300,
}
HOST = {**RECORD, **dict.fromkeys(event_table.IDENTITY, "(host)"), "node": "node1"}


def output(*records: dict[str, str]) -> dict[str, object]:
    return {
        "name": "events",
        "kind": "events",
        "groupBy": [],
        "total": {"value": len(records)},
        "events": {"records": list(records), "received": len(records), "lost": 0, "dropped": 0},
    }


def test_what_is_said_twice_is_said_once() -> None:
    shop, host = event_table.terse([RECORD, HOST])
    assert list(shop) == ["time", "pod", "pid", "file", "arguments"]
    assert (shop["time"], shop["pod"], host["pod"]) == ("13:23:27.356", "shop/web-1/nginx", "(host)")


def test_a_machine_without_pods_needs_no_column_for_them() -> None:
    assert list(event_table.terse([HOST, HOST])[0]) == ["time", "pid", "file", "arguments"]


def test_what_differs_stays() -> None:
    first, _ = event_table.terse([RECORD, {**HOST, "node": "node2", "command": "other"}])
    assert first["node"] == "node1" and first["command"] == "sleep"


@given(
    st.lists(st.lists(st.text("ab /", max_size=90), min_size=4, max_size=4), min_size=1, max_size=5),
    st.integers(40, 200),
)
def test_a_table_is_no_wider_than_the_terminal(body: list[list[str]], width: int) -> None:
    header = ["TIME", "A_LONG_TITLE_OF_A_NUMBER", "FILE", "ARGUMENTS"]
    cut_header, cut = event_table.fitted(header, body, width)
    lines = render._columns(cut_header, cut)
    assert max(map(len, lines)) <= width
    for row, short in zip(body, cut, strict=True):
        for cell, shown in zip(row, short, strict=True):
            assert shown == cell or "…" in shown


def test_of_a_path_the_end_is_kept_and_of_words_the_beginning() -> None:
    header, body = ["FILE", "ARGUMENTS"], [["/usr/lib/very/long/way/to/sleep", "sleep " + "x" * 300]]
    (row,) = event_table.fitted(header, body, 40)[1]
    assert row[0].startswith("…") and row[0].endswith("/to/sleep") and row[1].startswith("sleep x")


def test_a_time_and_a_process_are_told_from_others_however_narrow_it_is() -> None:
    header, body = ["TIME", "PID", "ARGUMENTS"], [["13:23:27.356", "a-long-name[3978]", "sleep " + "x" * 300]]
    (row,) = event_table.fitted(header, body, 32)[1]
    assert row[:2] == ["13:23:27", "a-l…[3978]"]
    (row,) = event_table.fitted(header, body, 400)[1]
    assert row == body[0]


def test_a_wide_terminal_and_a_pipe_show_everything() -> None:
    header, body = ["FILE", "ARGUMENTS"], [["/bin/true", "true"]]
    assert event_table.fitted(header, body, 100) == (header, body)
