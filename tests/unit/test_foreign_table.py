"""The table of foreign programs: what is written is read again, all are tried in ten turns, what worked has to work."""

from __future__ import annotations

from tests.foreign import table

ROWS = [
    table.row("bcc", "tcpconnect", {"state": "changes", "outputs": ["ipv4_events", "ipv6_events"]}),
    table.row("bcc", "compactsnoop", {"state": "fails", "why": "KernelRefused: it reads\nmore | arguments"}),
    table.row("bpftrace", "tcpconnect", {"state": "loads", "outputs": []}),
]


def document() -> str:
    return table.document(ROWS, release="6.12.1", versions={"bcc": "0.26", "bpftrace": "0.17"}, date="2026-11-26")


def test_the_document_is_read_as_it_was_written() -> None:
    text = document()
    assert set(table.read(text)) == set(ROWS)
    assert [each.state for each in table.read(text)].count("no") == 1
    assert "on Linux 6.12.1, with Debian's bcc 0.26, bpftrace 0.17" in text
    assert "1 of 2 of bpfcc-tools and 0 of 1 of bpftrace" in text
    assert "| `compactsnoop` | not yet | KernelRefused: it reads more / arguments |" in text.splitlines()


def test_a_part_that_is_tried_again_renews_its_rows_only() -> None:
    again = table.row("bcc", "compactsnoop", {"state": "none", "why": "it ended"})
    found = table.renewed(ROWS, [again])
    assert [(each.kind, each.name, each.state) for each in found] == [
        ("bcc", "compactsnoop", "none"),
        ("bcc", "tcpconnect", "works"),
        ("bpftrace", "tcpconnect", "loads"),
    ]


def test_only_what_was_known_to_work_has_to() -> None:
    now = [
        table.row("bcc", "tcpconnect", {"state": "loads", "outputs": []}),
        table.row("bcc", "compactsnoop", {"state": "fails", "why": "still"}),
        table.row("bpftrace", "tcpconnect", {"state": "fails", "why": "of the other kind"}),
    ]
    assert [each.name for each in table.broken(now, ROWS)] == ["tcpconnect"]
    assert not table.broken(ROWS, ROWS)
    # An emulated kernel that ended says nothing of what it did not come to, and all where it came to nothing.
    late = [table.row(each.kind, each.name, {"state": "late", "why": "it ended"}) for each in ROWS]
    assert not table.broken([late[0], *ROWS[1:]], ROWS)
    assert [each.name for each in table.broken(late, ROWS)] == ["tcpconnect"]


def test_ten_turns_try_every_program_once() -> None:
    names = [("bcc", f"tool{number}") for number in range(124)] + [("bpftrace", f"script{n}") for n in range(38)]
    turns = [table.tenth(names, turn) for turn in range(10)]
    assert sorted(name for turn in turns for name in turn) == sorted(names)
    assert {len(turn) for turn in turns} == {16, 17}
    assert table.tenth(names, 1234) == turns[4]
