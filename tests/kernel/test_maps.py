"""Maps of each kind are read in bulk, exactly, and the same entry by entry."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from probefleet_agent.errors import KernelError, ProbefleetError
from probefleet_agent.kernel import links, maps, syscall
from probefleet_agent.kernel.uapi import MapType

from tests.kernel.support import Loaded, attachment, call_getppid

KINDS = ["ARRAY", "PERCPU_ARRAY", "HASH", "PERCPU_HASH", "LRU_HASH", "LRU_PERCPU_HASH"]
# Counts calls by (number of the call) % 23: 997 = 23 × 43 + 8.
SOURCE = """
struct {{ __uint(type, BPF_MAP_TYPE_{kind}); __uint(max_entries, {entries}); __type(key, u32); __type(value, u64); }}
counts SEC(".maps");
u64 number = 0;
SEC("tracepoint/syscalls/sys_enter_getppid")
int on_it(void *ctx)
{{
	u32 key;
	u64 one = 1, *count;
	if (!ours())
		return 0;
	key = number++ % 23; /* one thread calls */
	count = bpf_map_lookup_elem(&counts, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&counts, &key, &one, BPF_ANY);
	return 0;
}}
"""
GETPPID = attachment("on_it", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})
EXPECTED = {key: 43 + (key < 8) for key in range(23)}


def new_map(kind: MapType, *, entries: int, key_size: int = 4, value_size: int = 8, flags: int = 0) -> syscall.Fd:
    return syscall.map_create(
        kind, key_size=key_size, value_size=value_size, max_entries=entries, name="test", flags=flags
    )


def as_dict(keys: np.ndarray, values: np.ndarray) -> dict[int, int]:
    """Keys as numbers, values summed over CPUs."""
    numbers = np.ascontiguousarray(keys).view("<u4").ravel().tolist()
    sums = np.ascontiguousarray(values).view("<u8").reshape(len(values), -1).sum(axis=1).tolist()
    assert len(set(numbers)) == len(numbers), "a key came twice"
    return dict(zip(numbers, sums, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["batch", "each"])
@pytest.mark.shows("map/{kind}")
def test_every_kind_counts_exactly(kind: str, way: str) -> None:
    """Per-CPU kinds run on one CPU: a new key's first update would otherwise race with another CPU's."""
    entries = 23 if kind.endswith("ARRAY") else 4096
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with Loaded(SOURCE.format(kind=kind, entries=entries)) as loaded:
            with links.attach(loaded.programs["on_it"], GETPPID):
                call_getppid(997)
            info = maps.info(loaded.maps["counts"])
            if way == "batch":
                keys, values = maps.read(loaded.maps["counts"], info)
            else:
                keys, values = maps._read_each(loaded.maps["counts"], info)
                if info.type in syscall.uapi.PER_CPU_TYPES:
                    values = values.reshape(len(values), maps.possible_cpus(), -1)
    finally:
        os.sched_setaffinity(0, allowed)
    assert as_dict(keys, values) == EXPECTED
    assert keys.shape == (23, 4)
    assert values.shape == ((23, maps.possible_cpus(), 8) if "PERCPU" in kind else (23, 8))


def test_per_cpu_counts_of_all_cpus_are_added() -> None:
    source = SOURCE.format(kind="PERCPU_ARRAY", entries=23)
    with Loaded(source) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
        allowed = os.sched_getaffinity(0)
        try:
            for cpu, times in zip(sorted(allowed)[:2], (997, 23), strict=False):
                os.sched_setaffinity(0, {cpu})
                call_getppid(times)
        finally:
            os.sched_setaffinity(0, allowed)
        _, values = loaded.rows("counts")
    by_cpu = np.ascontiguousarray(values).view("<u8").reshape(23, -1).sum(axis=0).tolist()
    assert by_cpu[:2] == [997, 23]


@pytest.mark.parametrize("kind", [MapType.HASH, MapType.LRU_HASH])
def test_a_large_hash_comes_whole_in_several_batches(kind: MapType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "CHUNK_BYTES", 12 * 997)
    count = 23 * 997
    with new_map(kind, entries=4 * count) as fd:
        keys = np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 4)
        values = (np.arange(count, dtype="<u8") * 3).view(np.uint8).reshape(count, 8)
        maps.update_many(fd, keys, values)
        got = as_dict(*maps.read(fd, maps.info(fd)))
    assert got == {key: 3 * key for key in range(count)}


def test_a_crowded_bucket_makes_the_batch_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC: one entry asked for, buckets hold more. 997 entries in a map of 1024 buckets are enough for that."""
    monkeypatch.setattr(maps, "CHUNK_BYTES", 1)
    monkeypatch.setattr(maps, "MIN_BATCH", 1)
    with new_map(MapType.HASH, entries=1024) as fd:
        keys = np.arange(997, dtype="<u4").view(np.uint8).reshape(997, 4)
        maps.update_many(fd, keys, np.zeros((997, 8), np.uint8))
        assert len(as_dict(*maps.read(fd, maps.info(fd)))) == 997


def test_an_empty_hash_has_no_rows_but_columns() -> None:
    for kind, shape in ((MapType.HASH, (0, 8)), (MapType.PERCPU_HASH, (0, maps.possible_cpus(), 8))):
        with new_map(kind, entries=23) as fd:
            keys, values = maps.read(fd, maps.info(fd))
        assert keys.shape == (0, 4) and values.shape == shape


def test_a_key_that_stays_is_seen_once_while_others_come_and_go() -> None:
    stop = threading.Event()
    with new_map(MapType.HASH, entries=8192) as fd:
        staying = np.arange(997, dtype="<u4").view(np.uint8).reshape(997, 4)
        passing = np.arange(10_000, 10_997, dtype="<u4").view(np.uint8).reshape(997, 4)
        maps.update_many(fd, staying, np.zeros((997, 8), np.uint8))

        def churn() -> None:
            while not stop.is_set():
                maps.update_many(fd, passing, np.zeros((997, 8), np.uint8))
                maps.delete_many(fd, passing)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(50):
                found = as_dict(*maps.read(fd, maps.info(fd)))
                assert found.keys() >= set(range(997))
        finally:
            stop.set()
            thread.join()


def test_deleting_counts_what_was_there() -> None:
    with new_map(MapType.HASH, entries=1024) as fd:
        keys = np.arange(997, dtype="<u4").view(np.uint8).reshape(997, 4)
        maps.update_many(fd, keys[::2], np.zeros((499, 8), np.uint8))
        assert maps.delete_many(fd, keys) == 499
        assert maps.delete_many(fd, keys) == 0
        assert len(maps.read(fd, maps.info(fd))[0]) == 0


def test_a_full_map_says_so() -> None:
    with new_map(MapType.HASH, entries=7) as fd:
        keys = np.arange(23, dtype="<u4").view(np.uint8).reshape(23, 4)
        with pytest.raises(KernelError, match="room for 7 entries") as caught:
            maps.update_many(fd, keys, np.zeros((23, 8), np.uint8))
    assert caught.value.errno == errno.E2BIG


@pytest.mark.parametrize("way", ["batch", "each"])
def test_per_cpu_values_are_written_for_each_cpu(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "each":
        monkeypatch.setattr(maps, "_batch", lambda *_: (0, errno.EINVAL))
    with new_map(MapType.PERCPU_ARRAY, entries=3) as fd:
        values = np.arange(3 * maps.possible_cpus(), dtype="<u8").reshape(3, -1)
        keys = np.arange(3, dtype="<u4").view(np.uint8).reshape(3, 4)
        maps.update_many(fd, keys, values.view(np.uint8).reshape(3, maps.possible_cpus(), 8))
        _, got = maps.read(fd, maps.info(fd))
    assert np.ascontiguousarray(got).view("<u8").reshape(3, -1).tolist() == values.tolist()


def test_wrong_sizes_never_reach_the_kernel() -> None:
    with new_map(MapType.HASH, entries=7) as fd:
        with pytest.raises(ProbefleetError, match=r"wants \(n, 4\)"):
            maps.update_many(fd, np.zeros((1, 8), np.uint8), np.zeros((1, 8), np.uint8))
        with pytest.raises(ProbefleetError, match=r"wants \(n, 8\)"):
            maps.update_many(fd, np.zeros((1, 4), np.uint8), np.zeros((1, 4), np.uint8))
        with pytest.raises(ProbefleetError, match="counters"):
            maps.sum_lost(fd)


def test_single_entries() -> None:
    with new_map(MapType.HASH, entries=7) as fd:
        assert syscall.map_lookup(fd, b"abcd", 8) is None
        syscall.map_update(fd, b"abcd", b"12345678")
        assert syscall.map_lookup(fd, b"abcd", 8) == b"12345678"
        values, there = maps.lookup_many(fd, maps.info(fd), np.frombuffer(b"abcdnone", np.uint8).reshape(2, 4))
        assert there.tolist() == [True, False] and values[0].tobytes() == b"12345678"
        assert syscall.map_delete(fd, b"abcd") and not syscall.map_delete(fd, b"abcd")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (MapType.ARRAY, {"entries": 4096}),
        (MapType.PERCPU_ARRAY, {"entries": 4096}),
        (MapType.HASH, {"entries": 16384, "key_size": 16, "value_size": 40}),
        (MapType.PERCPU_HASH, {"entries": 16384, "key_size": 8}),
        (MapType.LRU_HASH, {"entries": 16384, "key_size": 8}),
        (MapType.RINGBUF, {"entries": 1 << 20, "key_size": 0, "value_size": 0}),
        (MapType.STACK_TRACE, {"entries": 4096, "value_size": 127 * 8}),
    ],
)
def test_the_estimate_of_a_maps_memory_holds(kind: MapType, sizes: dict[str, int]) -> None:
    """Within a fifth of what the kernel says once the map is there (Linux 6.4 counts exactly)."""
    with new_map(kind, **sizes) as fd:
        used, estimate = maps.memory_used_bytes(fd), maps.memory_bytes(maps.info(fd))
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 4):
        assert used > 0
        return
    assert 0.8 * used <= estimate <= 1.25 * used, (used, estimate)


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-1\n", [0, 1]), ("0", [0]), ("0-2,5,7-8", [0, 1, 2, 5, 7, 8]), ("\n", [])]
)
def test_lists_of_cpus(text: str, cpus: list[int]) -> None:
    assert maps.cpu_list(text) == cpus


def test_numbers_of_cpus_that_are_left_out_take_no_place_in_an_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "possible").write_text("0,2-3\n")
    monkeypatch.setattr(maps, "Path", lambda _: tmp_path / "possible")
    assert maps.possible_cpus.__wrapped__() == 3, "the kernel copies num_possible_cpus() values"
