"""``probefleet purge``: says what goes, asks a person, and leaves nothing behind, as the kernel itself says."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from probefleet_agent.kernel import pins
from probefleet_cli import local_pods, measurement, preparation, sources

from tests.kernel.test_cli_run import finish, start, wait_until

Ids = dict[str, set[int]]


@pytest.fixture
def bpffs(root: pins.Root) -> Iterator[Path]:
    """A bpffs with the pins of an agent that went away, and those of a run that was killed."""
    catalog = sources.load_catalog()
    given = sources.read(["runqlat", "syscount"], catalog=catalog, settings={}, interval=None)
    prepared = preparation.prepare(given, catalog=catalog)
    with measurement.open_engine(root.path.parent, "/") as engine:
        engine.apply(preparation.push(prepared, pods=local_pods.find(), namespace=None, version=1))
    run = start("run", "opensnoop", "--bpffs", root.path.parent)
    folder = root.path.parent / f"probefleet-run-{run.pid}" / "probefleet" / "instances"
    wait_until(run, lambda: bool(list(folder.glob("[0-9a-f]*/link_*"))))
    run.kill()
    run.communicate()
    yield root.path.parent


def ids(kind: str) -> set[int]:
    """All programs, maps or links of the kernel."""
    said = subprocess.run(["bpftool", "--json", kind, "show"], capture_output=True, text=True, check=True).stdout
    return {int(each["id"]) for each in json.loads(said)}


def ours(bpffs: Path) -> list[str]:
    """What is in a bpffs besides the kernel's own iterators."""
    return [path.name for path in bpffs.iterdir() if path.name not in ("maps.debug", "progs.debug")]


def pinned(bpffs: Path) -> Ids:
    """The kernel's numbers of what is pinned there."""
    found: Ids = {"prog": set(), "map": set(), "link": set()}
    for path in bpffs.rglob("*_*"):
        kind = path.name.partition("_")[0]
        if kind in found and not path.is_dir():
            said = subprocess.run(
                ["bpftool", "--json", kind, "show", "pinned", str(path)], capture_output=True, text=True, check=True
            )
            told = json.loads(said.stdout)
            found[kind].add(int((told[0] if isinstance(told, list) else told)["id"]))
    return found


def answered(bpffs: Path, answer: str) -> tuple[int, str]:
    """Exit status and words of a purge on a terminal, where a person answers."""
    person, terminal = pty.openpty()
    try:
        os.write(person, answer.encode())
        done = subprocess.run(
            [sys.executable, "-m", "probefleet_cli.main", "purge", "--bpffs", str(bpffs)],
            stdin=terminal,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(person)
        os.close(terminal)
    return done.returncode, done.stdout + done.stderr


def test_purge_asks_and_leaves_nothing(bpffs: Path) -> None:
    before = pinned(bpffs)
    assert min(map(len, before.values())) >= 9, "three probes' pins"
    status, said = answered(bpffs, "n\n")
    assert status == 1 and "nothing was removed" in said
    assert pinned(bpffs) == before
    status, said = answered(bpffs, "y\n")
    assert status == 0, said
    assert "catalog/runqlat (default/runqlat): 3 programs, 3 links, " in said
    assert "catalog/syscount (default/syscount): 3 programs, 3 links, " in said
    assert "left by a run that died (probefleet-run-" in said and "catalog/opensnoop" in said
    assert ours(bpffs) == [], "no pin, no folder"
    # The kernel frees what nobody holds any more by itself, a moment later.
    wait_until(None, lambda: not any(before[kind] & ids(kind) for kind in before))
    assert finish(start("purge", "--bpffs", bpffs))[0] == f"nothing of ours is pinned under {bpffs}\n"


@pytest.mark.parametrize("command", [("purge", "--yes"), ("map", "list"), ("inspect", "--instance", "a")])
def test_who_may_not_look_is_not_told_that_nothing_is_there(bpffs: Path, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "probefleet_cli.main", *command, "--bpffs", str(bpffs)],
        capture_output=True, text=True, check=False, user=65534, group=65534, cwd="/",
    )  # fmt: skip
    assert done.returncode == 1 and not done.stdout
    assert "is not for this user to read. What is pinned is seen by root: sudo probefleet" in done.stderr


def test_purge_asks_nobody_in_a_pipe(bpffs: Path) -> None:
    before = pinned(bpffs)
    done = subprocess.run(
        [sys.executable, "-m", "probefleet_cli.main", "purge", "--bpffs", str(bpffs)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Write --yes" in done.stderr
    assert pinned(bpffs) == before
    assert "removed" in finish(start("purge", "--yes", "--bpffs", bpffs))[0]
    assert ours(bpffs) == []


def test_a_run_under_way_is_left_alone(root: pins.Root) -> None:
    bpffs = root.path.parent
    run = start("run", "opensnoop", "--bpffs", bpffs)
    try:
        folder = bpffs / f"probefleet-run-{run.pid}"
        wait_until(run, lambda: bool(list(folder.glob("probefleet/instances/[0-9a-f]*/link_*"))))
        _, errors = finish(start("purge", "--yes", "--bpffs", bpffs))
        assert f"{folder} belongs to a run that is under way" in errors
        assert list(folder.glob("probefleet/instances/[0-9a-f]*/link_*"))
    finally:
        run.terminate()
        run.communicate()
