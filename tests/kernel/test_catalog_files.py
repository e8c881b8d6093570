"""filetop and cachestat: what is read from files and written to them, and what of it is in memory already; exact."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.catalog_probe import Running
from tests.workloads import run

PAGE_BYTES = 4096


@pytest.fixture
def web() -> Iterator[Path]:
    with run.in_cgroup("web") as cgroup:
        yield cgroup


def text(value: object) -> str:
    return bytes(value).split(b"\0", 1)[0].decode()  # type: ignore[call-overload]


def transfers(probe: Running, cgroup: Path | None = None) -> dict[str, tuple[int, int, int, int]]:
    """File → (reads, bytes read, writes, bytes written)."""
    keys, sums = probe.rows("transfers", cgroup=run.cgroup_id(cgroup) if cgroup else None)
    return {
        text(key["file"]): tuple(int(value[name]) for name in value.dtype.names)
        for key, value in zip(keys, sums, strict=True)
    }


# filetop


@pytest.mark.shows("probe/filetop")
def test_997_reads_and_23_writes_of_a_file(web: Path, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(bytes(997 * 101))
    with run.start("files", 997, path, "--writes", 23, "--size", 101, cgroup=web) as workload:
        with Running("filetop") as probe:
            before = workload.transferred()
            workload.go()
            assert workload.done()["bytes"] == (997 + 23) * 101
            made = workload.transferred() - before
            assert transfers(probe, web) == {"ledger.db": (997, 997 * 101, 23, 23 * 101)}
            # The kernel's own account of the process: the word to go and the "done" line are on pipes.
            assert made.read_calls == 997 + 1 and made.write_calls == 23 + 1
            assert made.read_bytes == 997 * 101 + 1
            (key,) = probe.rows("transfers", cgroup=run.cgroup_id(web))[0]
            number = path.stat().st_dev
            assert text(key["directory"]) == tmp_path.name[:31]
            assert int(key["device"]) == os.major(number) << 20 | os.minor(number)
            assert int(key["inode"]) == path.stat().st_ino and int(key["process"]) == 0
            assert probe.lost() == [0, 0, 0, 0]


def test_every_call_that_reads_or_writes_is_seen(tmp_path: Path) -> None:
    path, other = tmp_path / "all-ways", tmp_path / "nothing-else"
    path.write_bytes(bytes(1000))
    descriptor, target = os.open(path, os.O_RDWR), os.open(other, os.O_WRONLY | os.O_CREAT)
    try:
        with Running("filetop", processes="true") as probe:
            assert os.write(descriptor, b"x" * 2) == 2
            assert os.pwrite(descriptor, b"x" * 3, 0) == 3
            assert os.writev(descriptor, [b"x" * 5]) == 5
            assert os.pwritev(descriptor, [b"x" * 7], 0) == 7
            assert os.pwritev(descriptor, [b"x" * 11], 0, os.RWF_DSYNC) == 11
            assert len(os.read(descriptor, 13)) == 13
            assert len(os.pread(descriptor, 17, 0)) == 17
            assert os.readv(descriptor, [bytearray(19)]) == 19
            assert os.preadv(descriptor, [bytearray(23)], 0) == 23
            assert os.preadv(descriptor, [bytearray(29)], 0, os.RWF_HIPRI) == 29
            assert os.sendfile(target, descriptor, 0, 31) == 31
            found = transfers(probe)
            mine = [key for key in probe.rows("transfers")[0] if text(key["file"]) == "all-ways"]
        assert found["all-ways"] == (6, 13 + 17 + 19 + 23 + 29 + 31, 5, 2 + 3 + 5 + 7 + 11)
        assert "nothing-else" not in found, "sendfile reads one file; what it writes to is no write call"
        assert [int(key["process"]) for key in mine] == [os.getpid()]
    finally:
        os.close(descriptor)
        os.close(target)


def test_pipes_and_devices_are_no_files_and_failures_no_transfers(web: Path, tmp_path: Path) -> None:
    path = tmp_path / "read-only"
    path.write_bytes(b"x")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with Running("filetop", processes="true") as probe:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(descriptor, b"x")
            run.run("files", 23, "/dev/zero", cgroup=web)
            assert "read-only" not in transfers(probe)
            assert transfers(probe, web) == {}
    finally:
        os.close(descriptor)


def test_a_refused_pods_files_are_not_counted(web: Path, tmp_path: Path) -> None:
    path = tmp_path / "refused"
    path.write_bytes(bytes(23))
    with Running("filetop", filter_on="1") as probe:
        probe.refuse(run.cgroup_id(web))
        run.run("files", 23, path, "--size", 1, cgroup=web)
        assert transfers(probe, web) == {}


# cachestat


@contextlib.contextmanager
def disk(pages: int, *, mounted: Path | None = None) -> Iterator[Path]:
    """A block device of so many pages; with a file system on it, and one file of so many pages, where it is mounted."""
    if mounted is None:
        # The kernel forgets a block device's pages when nobody has it open.
        with run.loop_device(pages * PAGE_BYTES) as device, device.open("rb", buffering=0):
            yield device
        return
    with run.loop_device(pages * PAGE_BYTES + (8 << 20)) as device:
        subprocess.run(["mkfs.ext4", "-q", "-b", str(PAGE_BYTES), str(device)], check=True, capture_output=True)
        mounted.mkdir()
        # A guest of tests/kernel/vm has the file system as a module, and nothing that loads it when it is wanted.
        if "\text4\n" not in Path("/proc/filesystems").read_text():
            subprocess.run(["modprobe", "ext4"], check=True)
        subprocess.run(["mount", "-t", "ext4", "-o", "noatime", str(device), str(mounted)], check=True)
        try:
            path = mounted / "file"
            path.write_bytes(bytes(pages * PAGE_BYTES))
            yield path
        finally:
            # A process that looked into it a moment ago can keep it busy for that moment.
            deadline = time.monotonic() + run.PHASE_SECONDS
            while subprocess.run(["umount", str(mounted)], capture_output=True, check=False).returncode:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def forget(path: Path) -> None:
    """Take the file's pages out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def pages(probe: Running, cgroup: Path) -> tuple[int, int, int]:
    """(hits, misses, added) of a cgroup."""
    _, sums = probe.rows("pages", cgroup=run.cgroup_id(cgroup))
    return tuple(int(sums[name].sum()) for name in ("hits", "misses", "added"))  # type: ignore[return-value]


@pytest.mark.parametrize("what", ["block device", "file"])
@pytest.mark.shows("probe/cachestat")
def test_997_pages_that_are_not_there_are_misses_and_then_hits(web: Path, tmp_path: Path, what: str) -> None:
    with disk(997, mounted=tmp_path / "disk" if what == "file" else None) as path:
        forget(path)
        with Running("cachestat") as probe:
            run.run("files", 997, path, "--random", cgroup=web)
            hits, misses, added = pages(probe, web)
            # The file system's own pages, which say where the file's lie, are added as well.
            assert (hits, misses) == (0, 997) and 997 <= added <= 997 + 8
            run.run("files", 997, path, "--random", cgroup=web)
            assert pages(probe, web) == (997, 997, added)
            assert probe.lost() == [0, 0, 0, 0]


def test_what_read_ahead_has_brought_is_a_hit(web: Path) -> None:
    with disk(997) as path:
        forget(path)
        with Running("cachestat") as probe:
            run.run("files", 997, path, cgroup=web)
            hits, misses, added = pages(probe, web)
            assert hits + misses == added == 997
            assert 0 < misses < 100


def test_a_read_of_many_pages_wants_each_of_them_once(web: Path) -> None:
    """23 reads of 43 pages and a part each: 44 or 45 pages, as they lie."""
    size = 43 * PAGE_BYTES + 1000
    with disk(1024) as path:
        forget(path)
        wanted = sum((number * size + size - 1) // PAGE_BYTES - number * size // PAGE_BYTES + 1 for number in range(23))
        with Running("cachestat") as probe:
            run.run("files", 23, path, "--size", size, cgroup=web)
            hits, misses, _ = pages(probe, web)
            assert hits + misses == wanted
            run.run("files", 23, path, "--size", size, cgroup=web)
            assert pages(probe, web)[:2] == (hits + wanted, misses)


def test_what_has_no_page_cache_behind_it_is_not_counted(web: Path) -> None:
    """/proc makes up what is read, tmpfs is memory itself, and O_DIRECT passes the cache by."""
    memory = Path("/dev/shm") / f"probefleet-test-{os.getpid()}"
    memory.write_bytes(bytes(23 * PAGE_BYTES))
    try:
        with run.loop_device() as device, Running("cachestat") as probe:
            run.run("files", 1, "/proc/self/status", "--size", 1, cgroup=web)
            run.run("files", 23, memory, cgroup=web)
            run.run("blockio", 23, device, cgroup=web)
            assert pages(probe, web)[:2] == (0, 0)
    finally:
        memory.unlink()


def test_a_refused_pods_pages_are_not_counted(web: Path) -> None:
    with disk(23) as path, Running("cachestat", filter_on="1") as probe:
        forget(path)
        probe.refuse(run.cgroup_id(web))
        run.run("files", 23, path, cgroup=web)
        assert pages(probe, web) == (0, 0, 0)
