"""What a guest asks of the host's compilers, the host answers: the same words on both sides, without a guest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from probefleet_agent.kernel import bcc
from probefleet_wire import clang, sandbox

from tests.kernel import host_compilers, vm_questions

MADE = clang.Compiled(b"object", "digest", (), 0.5)
PRINTED = sandbox.Finished(0, b"{}", b"", "", 0.5, 1)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The host's compilers are stand-ins that keep what they were asked; the guest's questions go to them."""
    found: list[object] = []

    def core(source: str, *, name: str, include_dirs: list[Path], **_: object) -> clang.Compiled:
        found.append((source, name, include_dirs))
        if "wrong" in source:
            raise clang.CompileError([clang.Diagnostic(name, 7, 1, "error", "it is wrong")])
        return MADE

    def plain(text: str) -> bytes:
        found.append(text)
        return b"plain"

    def run_bcc(text: str, source: str, flags: list[str], tree: Path, formats: list[str], limits: object) -> object:
        found.append((text, source, flags, tree, formats))
        return PRINTED

    def tree(types: bytes, *, root: Path, release: str) -> Path:
        found.append((types, release))
        return root / "tree"

    for name, stand_in in (("core", core), ("clang_object", plain), ("bcc", run_bcc), ("bcc_tree", tree)):
        monkeypatch.setattr(host_compilers.REAL, name, stand_in)
    (tmp_path / "vmlinux").write_bytes(b"types")
    compilers = host_compilers.Compilers(tmp_path / "vmlinux", folder=tmp_path / "kept")
    monkeypatch.setattr(vm_questions, "there", lambda: True)
    monkeypatch.setattr(vm_questions, "ask", compilers)
    return found


def test_an_object_is_asked_for_once(asked: list[object]) -> None:
    for _ in range(2):
        assert host_compilers._compile_core("int x;", name="x.c", include_dirs=[Path("/i")]) == MADE
        assert host_compilers._clang_object("int y;") == b"plain"
    assert asked == [("int x;", "x.c", [Path("/i")]), "int y;"]


def test_a_mistake_comes_back_with_its_place(asked: list[object]) -> None:
    with pytest.raises(clang.CompileError, match=r"x.c:7:1: error: it is wrong"):
        host_compilers._compile_core("wrong", name="x.c", include_dirs=[])


def test_bcc_compiles_against_the_guests_types(asked: list[object]) -> None:
    assert host_compilers.run_bcc("t", "s", ["-f"], Path("/none"), ["format"], bcc.LIMITS) == PRINTED
    (types, _), (text, source, flags, tree, formats) = asked  # type: ignore[misc]
    assert (types, text, source, flags, tree.name, formats) == (b"types", "t", "s", ["-f"], "tree", ["format"])


def test_on_the_host_bcc_compiles_with_the_tests_own_tree_and_limits(
    asked: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compilers = host_compilers.Compilers(tmp_path / "none", folder=tmp_path / "kept")
    monkeypatch.setattr(vm_questions, "there", lambda: False)
    monkeypatch.setattr(host_compilers, "_this_machines", lambda: compilers)
    short = replace(bcc.LIMITS, wall_seconds=1.0)
    ways = [
        (Path("/a/d1"), bcc.LIMITS),
        (Path("/a/d1"), bcc.LIMITS),
        (Path("/a/d2"), bcc.LIMITS),
        (Path("/a/d1"), short),
    ]
    for tree, limits in ways:
        assert host_compilers.run_bcc("t", "s", ["-f"], tree, ["format"], limits) == PRINTED
    assert asked == [("t", "s", ["-f"], tree, ["format"]) for tree, _ in (ways[0], *ways[2:])], "once of the same"


@pytest.mark.parametrize(
    ("finished", "times"),
    [
        pytest.param(sandbox.Finished(1, b"", b"x.c:7:1: error: it is wrong\n", "", 0.5, 1), 1, id="a mistake"),
        pytest.param(sandbox.Finished(1, b"", b"error: No space left on device\n", "", 0.5, 1), 2, id="a full disk"),
        pytest.param(sandbox.Finished(-9, b"", b"x.c:7:1: error: it is\n", "", 0.5, 1), 2, id="killed"),
        pytest.param(sandbox.Finished(1, b"", b"x.c:7:1: error: it is\n", "memory", 0.5, 1), 2, id="a limit"),
    ],
)
def test_a_mistake_is_kept_if_it_is_the_sources(
    asked: list[object], monkeypatch: pytest.MonkeyPatch, finished: sandbox.Finished, times: int
) -> None:
    monkeypatch.setattr(host_compilers.REAL, "bcc", lambda text, *_: asked.append(text) or finished)
    for _ in range(2):
        assert host_compilers.run_bcc("t", "s", [], Path("/none"), [], bcc.LIMITS) == finished
    assert asked.count("t") == times


def test_clangs_mistakes_with_a_line_are_kept(asked: list[object]) -> None:
    for _ in range(2):
        with pytest.raises(clang.CompileError):
            host_compilers._compile_core("wrong", name="x.c", include_dirs=[])
    assert len(asked) == 1


def test_what_took_too_long_is_asked_again(asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(source: str, **_: object) -> clang.Compiled:
        asked.append(source)
        raise clang.CompileError([clang.Diagnostic("x.c", 0, 0, "error", "took more than 40 s")], lasting=False)

    late = sandbox.Finished(-9, b"", b"", "wall", 40.0, 1)
    monkeypatch.setattr(host_compilers.REAL, "core", slow)
    monkeypatch.setattr(host_compilers.REAL, "bcc", lambda text, *_: asked.append(text) or late)
    for _ in range(2):
        with pytest.raises(clang.CompileError, match="took more than 40 s") as error:
            host_compilers._compile_core("int x;", name="x.c", include_dirs=[])
        assert not error.value.lasting
        assert host_compilers.run_bcc("t", "s", [], Path("/none"), [], bcc.LIMITS) == late
    assert [each for each in asked if isinstance(each, str)] == ["int x;", "t"] * 2


def test_what_the_host_cannot_do_is_asked_again(asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    working = host_compilers.REAL.clang_object

    def broken(text: str) -> bytes:
        raise OSError("no clang")

    monkeypatch.setattr(host_compilers.REAL, "clang_object", broken)
    with pytest.raises(RuntimeError, match="the host cannot compile it: OSError: no clang"):
        host_compilers._clang_object("int y;")
    monkeypatch.setattr(host_compilers.REAL, "clang_object", working)
    assert host_compilers._clang_object("int y;") == b"plain"
