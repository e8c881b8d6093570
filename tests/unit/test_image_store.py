"""Nodes of the test cluster begin with links to images that were unpacked once. What unpacks is a stand-in here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.kubebox import image_store, settings


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which sets were unpacked; each is a layer's file and the two databases."""
    made: list[str] = []

    def unpack(kept: Path, archives: Sequence[Path]) -> None:
        made.append(kept.name)
        for name in ("layers/1/fs/usr/lib/cert9.db", *image_store.DATABASES):
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (kept / name).write_text(kept.name)

    monkeypatch.setattr(settings, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(image_store, "_digest", lambda archives: archives[0].stem)
    monkeypatch.setattr(image_store, "_unpack", unpack)
    return made


def test_files_are_shared_and_databases_are_each_nodes_own(tmp_path: Path, unpacked: list[str]) -> None:
    roots = [tmp_path / name / "containerd" for name in ("node1", "node2")]
    for root in roots:
        root.parent.mkdir()
        assert image_store.fill(root, [Path("first.tar")])
    assert unpacked == ["first"]
    (layer,) = {(root / "layers/1/fs/usr/lib/cert9.db").stat().st_ino for root in roots}
    kept = tmp_path / "cache/images/first"
    for name in image_store.DATABASES:
        assert len({(folder / name).stat().st_ino for folder in (kept, *roots)}) == 3
        (roots[0] / name).write_text("written to")
        assert (kept / name).read_text() == (roots[1] / name).read_text() == "first"
    assert layer == (kept / "layers/1/fs/usr/lib/cert9.db").stat().st_ino


def test_two_sets_are_kept_and_nothing_that_is_half_of_one(tmp_path: Path, unpacked: list[str]) -> None:
    store = tmp_path / "cache/images"
    for at, name in enumerate(("first", "second", "third", "second")):
        (store / "broken.new").mkdir(parents=True)
        (store / "gone.old").mkdir()
        assert image_store.fill(tmp_path / f"containerd-{at}", [Path(f"{name}.tar")])
        os.utime(store / name, (at, at))
    assert unpacked == ["first", "second", "third"]
    assert {path.name for path in store.iterdir()} == {"second", "third", "lock"}


def test_where_there_are_no_links_nothing_is_unpacked(
    tmp_path: Path, unpacked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    assert not image_store.fill(tmp_path / "containerd", [Path("first.tar")])
    assert unpacked == [] and not (tmp_path / "containerd").exists()
