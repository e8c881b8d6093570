"""images/build keeps archives for other clones: whole, the same file where there can be links, and few."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "images/build"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program as a module, whose archives lie in a folder of the test's own."""
    loader = importlib.machinery.SourceFileLoader("images_build", str(PROGRAM))
    spec = importlib.util.spec_from_loader("images_build", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "images_build", module)
    loader.exec_module(module)
    monkeypatch.setattr(module, "OUTPUT", tmp_path / "build")
    (tmp_path / "build").mkdir()
    return module


def test_the_newest_archives_of_an_image_are_kept_and_those_of_others(tmp_path: Path, build: ModuleType) -> None:
    operator, agent = (next(each for each in build.ALL if each.name == name) for name in ("operator", "agent"))
    kept = tmp_path / "archives"
    for at, (image, digest) in enumerate(((agent, "a"), (operator, "1"), (operator, "2"), (operator, "3"))):
        image.archive.unlink(missing_ok=True)
        image.archive.write_text(digest)
        os.utime(image.archive, (at, at))
        build.keep(image, kept / f"{image.name}-{digest}.tar")
    assert {path.name for path in kept.iterdir()} == {"agent-a.tar", "operator-2.tar", "operator-3.tar"}
    assert (kept / "operator-3.tar").samefile(operator.archive)


def test_where_there_can_be_no_link_there_is_a_copy(
    tmp_path: Path, build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    old, new = tmp_path / "old.tar", tmp_path / "new.tar"
    old.write_text("whole")
    new.with_suffix(".new").write_text("hal")  # of a run that was interrupted
    build.link(old, new)
    assert new.read_text() == "whole" and not new.samefile(old)
    assert not new.with_suffix(".new").exists()
