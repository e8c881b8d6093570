"""What a compiler made is kept by all that it depends on, and by nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import kept


def test_an_answer_is_made_once_for_the_same_parts(tmp_path: Path) -> None:
    folder = tmp_path / "not there yet"
    assert kept.answer([b"text", b"clang 14"], lambda: b"one", folder=folder) == b"one"
    assert kept.answer([b"text", b"clang 14"], lambda: b"two", folder=folder) == b"one"
    assert kept.answer([b"text", b"clang 15"], lambda: b"three", folder=folder) == b"three"
    # The border between parts counts.
    assert kept.answer([b"textc", b"lang 14"], lambda: b"four", folder=folder) == b"four"


def test_what_could_not_be_made_is_tried_again(tmp_path: Path) -> None:
    def broken() -> bytes:
        raise OSError("no clang")

    with pytest.raises(OSError, match="no clang"):
        kept.answer([b"text"], broken, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert kept.answer([b"text"], lambda: b"made", folder=tmp_path) == b"made"


def test_what_nobody_asked_for_in_a_month_goes(tmp_path: Path) -> None:
    for name in (b"old", b"asked for", b"older"):
        kept.answer([name], lambda: b"bytes", folder=tmp_path)
    (tmp_path / "headers").mkdir()
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    kept.answer([b"asked for"], lambda: b"other bytes", folder=tmp_path)
    kept.answer([b"newer"], lambda: b"bytes", folder=tmp_path)
    kept.forget_unused(tmp_path)
    assert sum(path.is_file() for path in tmp_path.iterdir()) == 2
    assert kept.answer([b"asked for"], lambda: b"other bytes", folder=tmp_path) == b"bytes"
