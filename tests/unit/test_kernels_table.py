"""docs/kernels.md's table is what the tests showed: made of the committed results, and of nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.matrix import cells, plugin, results, table, turn
from tests.kernel.matrix.results import Outcome

TESTS = cells.ROOT / "tests" / "kernel"
HERE = results.Result("6.1.0-50-amd64", "#1 SMP Debian", "x86_64", True, "2026-11-26", {"passed": 2}, {})


def test_the_document_says_what_the_results_say() -> None:
    text = table.DOCUMENT.read_text()
    assert table.BEGIN in text and table.END in text
    made = table.written_into(text, results.committed())
    assert text == made, "python -m tests.kernel.matrix table makes it anew"


def test_a_changed_word_would_be_noticed() -> None:
    found = [replace(each, cells={**each.cells, "attach/kprobe": "yes, surely"}) for each in results.committed()]
    assert table.DOCUMENT.read_text() != table.written_into(table.DOCUMENT.read_text(), found or [HERE])


def test_every_mark_names_a_row() -> None:
    known = set(cells.cells())
    texts = [path.read_text() for path in TESTS.rglob("test_*.py")]
    marks = {
        name
        for text in texts
        for part in re.findall(r"mark\.shows\(([^)]*)\)", text)
        for name in re.findall(r'"([^"]+)"', part)
    }
    assert len(marks) > 50
    assert {name for name in marks if "{" not in name} <= known


def test_every_result_is_one_that_a_run_can_have() -> None:
    for each in results.committed():
        assert each.tests["passed"] > 0
        for cell, word in each.cells.items():
            assert re.fullmatch(r"yes|not tried|(no|in part|fails): .+", word), cell


@pytest.mark.parametrize(
    ("outcomes", "word"),
    [
        ([], "not tried"),
        ([Outcome("passed"), Outcome("passed")], "yes"),
        ([Outcome("passed"), Outcome("failed", "997 != 996")], "fails: 997 != 996"),
        ([Outcome("skipped", "no kprobes"), Outcome("skipped", "no kprobes")], "no: no kprobes"),
        ([Outcome("passed"), Outcome("skipped", "no perf link")], "in part: no perf link"),
    ],
)
def test_a_cell_is_the_sum_of_its_tests(outcomes: list[Outcome], word: str) -> None:
    found = results.by_cell([replace(each, cells=("attach/kprobe",)) for each in outcomes])
    assert found["attach/kprobe"] == word
    assert set(found) == set(cells.cells()), "what nobody tried is there, and says so"


def test_parts_of_a_run_make_a_whole_one() -> None:
    first = results.Run("6.1.0", "#1", "x86_64", True, "2026-11-25", {"a": Outcome("passed"), "b": Outcome("failed")})
    second = replace(first, tried_on="2026-11-26", outcomes={"b": Outcome("passed"), "c": Outcome("skipped", "why")})
    found = second.after(first)
    assert found.tried_on == "2026-11-26"
    assert found.result().tests == {"passed": 2, "skipped": 1, "failed": 0}
    assert replace(second, release="6.2.0").after(first).outcomes.keys() == {"b", "c"}, "another kernel's are its own"


SUITES = {"bullseye": "5.10", "bookworm": "6.1", "sid": "the newest"}


def column(release: str, **cells: str) -> results.Result:
    return replace(HERE, release=release, cells={"attach/tc": "yes", "attach/xdp": "yes", **cells})


def test_each_day_is_another_kernels_turn() -> None:
    found = [column("5.10.0-32-amd64"), column("6.1.0-50-amd64"), replace(column("6.18.44"), emulated=False)]
    assert [turn.suite(found, day, suites=SUITES) for day in range(4)] == ["bullseye", "bookworm"] * 2
    found.append(column("7.2.13", **{"attach/tc": "no: no tcx"}))
    assert [turn.suite(found, day, suites=SUITES) for day in range(3)] == ["bullseye", "bookworm", "sid"]


@pytest.mark.parametrize("word", ["not tried", "fails: 996 != 997"])
def test_a_kernel_that_was_not_seen_as_a_whole_waits(word: str) -> None:
    found = [column("5.10.0-32-amd64", **{"attach/tc": word}), column("7.2.13")]
    assert turn.suite(found, 0, suites=SUITES) == turn.suite(found, 1, suites=SUITES) == "sid"
    assert turn.suite(found[:1], 0, suites=SUITES) in ("bookworm", "bullseye")


def test_what_worked_and_works_no_more_is_named() -> None:
    before = replace(HERE, cells={"attach/tc": "yes", "attach/xdp": "yes", "attach/lsm": "no: no fentry"})
    now = replace(HERE, cells={"attach/tc": "no: no tcx", "attach/xdp": "yes", "attach/lsm": "not tried"})
    assert results.lost(before, now, ["attach/tc"]) == ["attach/tc: worked on 6.1.0-50-amd64, now no: no tcx"]
    assert results.lost(before, now, ["attach/xdp", "attach/lsm"]) == [], "of the other thirds nothing is said"


def test_three_thirds_are_every_row_once() -> None:
    thirds = [cells.third(turn) for turn in range(3)]
    assert sorted(cell for each in thirds for cell in each) == sorted(cells.cells())
    assert cells.third(41) == thirds[2] and max(map(len, thirds)) - min(map(len, thirds)) <= 1


def test_each_third_has_what_shows_its_rows_and_all_that_runs_nowhere_else(tmp_path: Path) -> None:
    def collected(third: int) -> set[str]:
        options = ["-p", "tests.kernel.matrix.plugin", "--matrix", str(tmp_path / "none"), "--matrix-third", str(third)]
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *options, "-m", "shows or vm_only"]
        files = [str(TESTS / name) for name in ("vm_only/test_kprobes.py", "test_links.py")]
        listed = subprocess.run([*command, *files], cwd=cells.ROOT, capture_output=True, text=True, check=True).stdout
        return {line for line in listed.splitlines() if "::" in line}

    first, second = collected(0), collected(1)
    nowhere_else = {test for test in first if "/vm_only/" in test}
    assert nowhere_else and nowhere_else == {test for test in second if "/vm_only/" in test}
    assert first - second and second - first, "the rows that test_links.py shows"


def test_a_parameter_becomes_the_rows_name() -> None:
    assert cells.named("map/{kind}", {"kind": "LRU_PERCPU_HASH", "way": "batch"}) == "map/lru-percpu-hash"


def test_a_skip_is_a_reason_in_a_few_words() -> None:
    words = "Skipped: this kernel lacks syscall_programs; PROBEFLEET_TEST_FORCE=syscall_programs runs it all the same"
    report = pytest.TestReport("test", ("", 0, ""), {}, "skipped", ("file.py", 1, words), "call")
    assert plugin._why(report) == "no syscall programs"


def test_no_choice_is_made_by_a_kernels_version() -> None:
    """Its release names the file of its types, BCC's LINUX_VERSION_CODE, a node in reports; nothing compares it."""
    told = {"btf_kernel.py", "bcc_headers/__init__.py", "engine.py", "doctor.py", "machine_commands.py"}
    sources = [
        path
        for part in ("node_agent", "operator", "protos/probefleet_wire")
        for path in (cells.ROOT / part).rglob("*.py")
    ]
    asks = re.compile(r"\b(?:uname\(\)|platform|system)\.release\b")
    found = {path for path in sources if asks.search(path.read_text())}
    assert {name for name in told if any(str(path).endswith(name) for path in found)} == told and len(found) == len(
        told
    )
    programs = [*(cells.ROOT / "bpf").rglob("*.bpf.c"), *(cells.ROOT / "bpf/include").glob("probefleet*.h")]
    assert len(programs) > 10
    assert not [path.name for path in programs if re.search(r"LINUX_VERSION|KERNEL_VERSION", path.read_text())]
