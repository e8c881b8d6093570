"""Maps that others pinned: found by path, read by programs and outputs, never written to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from probefleet_agent.kernel import maps, mounts, syscall
from probefleet_agent.kernel.uapi import MapType
from probefleet_cli import main
from probefleet_cli.failures import BadInput
from probefleet_wire.v1 import stream_pb2

from tests.kernel import policies
from tests.kernel.support import call_getppid

TABLE = """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 16); __type(key, u32); __type(value, u64); }
theirs SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
found SEC(".maps");
"""
READING = (
    TABLE
    + """
ON_CALL
{
	u32 key = 7, zero = 0;
	u64 *value = bpf_map_lookup_elem(&theirs, &key);
	if (ours() && value)
		probefleet_add(&found, &zero, *value);
	return 0;
}
"""
)
WRITES = {
    "through the pointer": "u64 *v = bpf_map_lookup_elem(&theirs, &key); if (v) __sync_fetch_and_add(v, 1);",
    "by update": "u64 one = 1; bpf_map_update_elem(&theirs, &key, &one, BPF_ANY);",
    "by delete": "bpf_map_delete_elem(&theirs, &key);",
}


@pytest.fixture
def pinned() -> Iterator[tuple[Path, syscall.Fd]]:
    """A hash that another loader made: 7 → 3, 8 → 4."""
    path = mounts.mount_bpffs() / f"test-of-others-{os.getpid()}"
    with syscall.map_create(MapType.HASH, key_size=4, value_size=8, max_entries=97, name="other_owner") as fd:
        for key, value in ((7, 3), (8, 4)):
            syscall.map_update(fd, key.to_bytes(4, "little"), value.to_bytes(8, "little"))
        path.unlink(missing_ok=True)
        syscall.obj_pin(fd, str(path))
        try:
            yield path, fd
        finally:
            path.unlink()


def policy(source: str, path: Path | str) -> dict[str, Any]:
    outputs = [
        {"name": name, "from": {"map": name}, "gauge": {"merge": "sum"}, "groupBy": ["key"]}
        for name in ("theirs", "found")
    ]
    return policies.c_policy(source, maps=[{"name": "theirs", "pinned": str(path)}], outputs=outputs, interval="1s")


def test_a_program_and_an_output_read_a_map_of_another_owner(pinned: tuple[Path, syscall.Fd]) -> None:
    path, fd = pinned
    with policies.run(policy(READING, path)) as run:
        call_getppid(997)
        assert run.rows("theirs") == {("7",): 3, ("8",): 4}
        assert run.rows("found") == {("0",): 3 * 997}
        syscall.map_update(fd, (7).to_bytes(4, "little"), (5).to_bytes(8, "little"))
        call_getppid(23)
        assert run.rows("theirs") == {("7",): 5, ("8",): 4}
        assert run.rows("found") == {("0",): 3 * 997 + 5 * 23}
        (pin,) = policies.folder().glob("probefleet/instances/*/map_theirs")
        with syscall.obj_get(str(pin)) as ours:
            assert maps.info(ours).id == maps.info(fd).id, "the same map, not a copy"
    assert path.exists(), "it stays when the policy goes"
    assert maps.read(fd, maps.info(fd))[0].shape == (2, 4)


@pytest.mark.parametrize("read", ["theirs", "found"])
def test_a_map_of_another_owner_that_is_full_is_no_loss_of_ours(pinned: tuple[Path, syscall.Fd], read: str) -> None:
    path, fd = pinned
    for key in range(97):
        syscall.map_update(fd, key.to_bytes(4, "little"), bytes(8))
    source = READING.replace("probefleet_add(&found, &zero, *value)", "bpf_map_update_elem(&found, &zero, value, 0)")
    wanted = policy(source, path)
    wanted["spec"]["outputs"] = [each for each in wanted["spec"]["outputs"] if each["name"] == read]
    with policies.run(wanted) as run:
        run.measured.sample_rest()
        (report,) = run.measured.reports()
    assert (report["uncounted"], report["columns"]["lost"]) == ([], "0")


@pytest.mark.parametrize("way", WRITES)
def test_a_program_that_could_write_to_it_is_refused(pinned: tuple[Path, syscall.Fd], way: str) -> None:
    path, fd = pinned
    source = TABLE + "ON_CALL { u32 key = 7; if (ours()) { " + WRITES[way] + " } return 0; }"
    with policies.run(policy(source, path), ready=False) as run:
        (status,) = run.measured.statuses()
        assert status.state == stream_pb2.PolicyStatus.FAILED and status.reason == "NotObserveOnly", status
        assert f"it could write to a map that others own: theirs ({path})" in status.message
        call_getppid(23)
    assert syscall.map_lookup(fd, (7).to_bytes(4, "little"), 8) == (3).to_bytes(8, "little")


def test_a_map_that_only_outputs_read_needs_no_proof(pinned: tuple[Path, syscall.Fd]) -> None:
    path, _ = pinned
    with policies.run(policy(TABLE + "ON_CALL { u32 k = 0; probefleet_add(&found, &k, 1); return 0; }", path)) as run:
        assert run.rows("theirs") == {("7",): 3, ("8",): 4}


@pytest.mark.parametrize(
    ("source", "path", "says"),
    [
        (
            READING,
            "/sys/fs/bpf/nobody",
            "map theirs at /sys/fs/bpf/nobody: No such file .*Nothing is pinned there",
        ),
        (READING.replace("u64", "u32"), None, "The program has a hash .*; the map at /sys.* is a hash of 4 → 8 bytes"),
    ],
    ids=["nothing there", "another layout"],
)
def test_what_does_not_fit_is_said(pinned: tuple[Path, syscall.Fd], source: str, path: str | None, says: str) -> None:

    with policies.run(policy(source, path or pinned[0]), ready=False) as run:
        (status,) = run.measured.statuses()
        assert status.state == stream_pb2.PolicyStatus.FAILED
        assert re.search(says, status.message), status.message


@pytest.mark.parametrize(
    ("use", "says"),
    [
        ({"pinned": "/etc/passwd"}, r'maps\[0\].pinned: "/etc/passwd"'),
        ({"pinned": "/sys/fs/bpf/../../etc/x"}, "leads down, not up"),
        ({"pinned": "/sys/fs/bpf/x", "maxEntries": 5}, "pinned and maxEntries at once: the map is there already"),
        ({"pinned": "/sys/fs/bpf/x", "values": []}, "pinned and values at once"),
    ],
)
def test_wrong_paths_and_fields_are_refused(use: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        policies.prepare(policies.c_policy(READING, maps=[{"name": "theirs", **use}]))


def test_a_map_of_others_is_dumped_and_never_set(pinned: tuple[Path, syscall.Fd]) -> None:
    path, fd = pinned
    with policies.run(policy(READING, path)):
        shown = CliRunner().invoke(main.machine, ["map", "dump", "test", "theirs"])
        assert shown.output == "7: 3\n8: 4\n" or shown.output == "8: 4\n7: 3\n", shown.exception
        done = CliRunner().invoke(main.machine, ["map", "set", "test", "theirs", "7", "1000"])
        assert f"theirs is another owner's, pinned at {path}: Probefleet only reads it" in str(done.exception)
        assert syscall.map_lookup(fd, (7).to_bytes(4, "little"), 8) == (3).to_bytes(8, "little")
