"""Starts workloads in cgroups and hands back what they did: exact numbers, for tests of every kind.

In: a workload's name and arguments, and the cgroup it is to be in. Out: the numbers of its "done" line. A test
either calls `run()`, or `start()`s a workload, attaches its probes while the workload is held, lets it `go()`,
waits until it is `done()`, and reads its counters while the process is still there. workload.h has the protocol.

    with run.in_cgroup("web") as cgroup, run.start("calls", "rare", 997, cgroup=cgroup) as workload:
        ...attach...
        workload.go()
        assert workload.done()["calls"] == 997
        ...read...

Facts against which a probe can be held come from the kernel's own ledgers, not from BPF: `Workload.switches()`
from the scheduler's, `block_requests()` from the block layer's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
BINARIES = SOURCES.parents[1] / "build" / "workloads"
# What a phase may take when the machine is busy, or emulated; a workload that needs longer says so.
PHASE_SECONDS = 60.0
SECTOR_BYTES = 512


class WorkloadError(Exception):
    """A workload did not do what it was asked for; the message holds what it said itself."""


@dataclass(frozen=True, slots=True)
class Switches:
    """How often tasks were put on a run queue: by a wake-up or their birth, and by being preempted."""

    woken: int
    preempted: int

    @property
    def queued(self) -> int:
        """How often they waited for a CPU: what a run-queue probe counts."""
        return self.woken + self.preempted

    def __sub__(self, earlier: Switches) -> Switches:
        return Switches(self.woken - earlier.woken, self.preempted - earlier.preempted)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a process's first thread had of the CPUs (Documentation/scheduler/sched-stats.rst)."""

    ran_ns: int
    waited_ns: int
    runs: int


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a process read and wrote by calls that succeeded, on files and on all else (/proc/PID/io)."""

    read_bytes: int
    written_bytes: int
    read_calls: int
    write_calls: int

    def __sub__(self, earlier: Transferred) -> Transferred:
        return Transferred(
            self.read_bytes - earlier.read_bytes,
            self.written_bytes - earlier.written_bytes,
            self.read_calls - earlier.read_calls,
            self.write_calls - earlier.write_calls,
        )


@dataclass(frozen=True, slots=True)
class Requests:
    """What a block device completed."""

    reads: int
    writes: int
    read_bytes: int
    written_bytes: int

    def __sub__(self, earlier: Requests) -> Requests:
        return Requests(
            self.reads - earlier.reads,
            self.writes - earlier.writes,
            self.read_bytes - earlier.read_bytes,
            self.written_bytes - earlier.written_bytes,
        )


@functools.cache
def build() -> Path:
    """Compile what has changed, once a test run; the folder of the programs."""
    made = subprocess.run(["make", "-C", str(SOURCES), "--quiet"], capture_output=True, text=True, check=False)
    if made.returncode:
        raise WorkloadError(f"the workloads do not build:\n{made.stdout}{made.stderr}")
    return BINARIES


def binary(name: str) -> Path:
    """A workload's program, built."""
    path = build() / name
    if not path.exists():
        raise WorkloadError(f"no workload {name!r}; there are {', '.join(sorted(p.name for p in BINARIES.iterdir()))}")
    return path


class Workload:
    """A held workload: already in its cgroup, and nothing of what it counts has happened yet.

    `ready` has the numbers of its "ready" line. Leaving the context lets it exit, and fails if it failed; a
    workload left by an exception, or before `go()`, is killed or leaves without a single event.
    """

    def __init__(self, name: str, *arguments: object, cgroup: Path | None = None) -> None:
        self.argv = [str(binary(name)), "--hold", *map(str, arguments)]
        self._process = subprocess.Popen(
            self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self._output = b""
        try:
            self.ready = self._phase("ready", PHASE_SECONDS)
            if cgroup is not None:
                place(self.pid, cgroup)
        except BaseException:
            self._end()
            raise

    @property
    def pid(self) -> int:
        """The process's id, seen from here."""
        return self._process.pid

    def go(self) -> None:
        """Let the events begin."""
        self._send(b"g")

    def hurry(self) -> None:
        """Let the events of one started with --hurry follow each other a hundred times as fast."""
        self._send(b"h")

    def done(self, *, seconds: float = PHASE_SECONDS) -> Mapping[str, int]:
        """Wait for the last event; the numbers of the "done" line. The process stays, asleep."""
        return self._phase("done", seconds)

    def stop(self) -> None:
        """End a workload that serves until it is told (`connects --serve`); `done()` follows."""
        self._send(b"s")

    def switches(self) -> Switches:
        """The scheduler's ledger of this process's and its children's tasks, once all of them sleep.

        A task's voluntary switches are its sleeps, and every sleep before the present one has ended in exactly
        one wake-up; so the difference of two readings, both made while the tasks sleep, is the number of
        wake-ups between. A task born in between counts its birth. (/proc/PID/status, since Linux 2.6.23.)
        """
        deadline = time.monotonic() + PHASE_SECONDS
        while (ledger := _asleep(self.pid)) is None:
            # A task is "done" an instant before it sleeps, and the kernel announces that to nobody.
            if time.monotonic() > deadline:
                raise WorkloadError(f"{self._described()} does not go to sleep")
            time.sleep(0.001)
        return ledger

    def schedule(self) -> Schedule:
        """Its time on a CPU and its waits for one, and how often it ran, of /proc/PID/schedstat."""
        return Schedule(*map(int, Path("/proc", str(self.pid), "schedstat").read_text().split()))

    def transferred(self) -> Transferred:
        """Its own account, of /proc/PID/io (Documentation/filesystems/proc.rst)."""
        lines = Path("/proc", str(self.pid), "io").read_text().splitlines()
        return Transferred(*(int(line.split()[1]) for line in lines[:4]))

    def __enter__(self) -> Workload:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            self._end()
            return
        self._send(b"x")
        try:
            status = self._process.wait(PHASE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise WorkloadError(f"{self._described()} does not exit") from error
        finally:
            said = self._end()
        if status:
            raise WorkloadError(f"{self._described()} failed with status {status}: {said}")

    def _described(self) -> str:
        return f"workload `{' '.join(self.argv[2:])}` of {self.argv[0]}"

    def _send(self, byte: bytes) -> None:
        assert self._process.stdin is not None
        # One that has failed tells why when its output is read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(byte)

    def _phase(self, name: str, seconds: float) -> dict[str, int]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._output:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise WorkloadError(f"{self._described()} is not {name} after {seconds:.0f} s")
            part = self._process.stdout.read(4096)
            if not part:
                raise WorkloadError(f"{self._described()} ended before it was {name}: {self._end()}")
            self._output += part
        line, self._output = self._output.split(b"\n", 1)
        phase, *facts = line.decode().split()
        if phase != name:
            raise WorkloadError(f"{self._described()} says {phase!r}, not {name!r}")
        return {key: int(value) for key, value in (fact.split("=") for fact in facts)}

    def _end(self) -> str:
        """Kill what still runs and close what is open; what the workload said on stderr."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        if process.poll() is None:
            process.kill()
            process.wait()
        said = "" if process.stderr.closed else process.stderr.read().decode(errors="replace").strip()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        return said


def start(name: str, *arguments: object, cgroup: Path | None = None) -> Workload:
    """Start a workload, held, in `cgroup`. `name` may be the path of a copy, for a command name of its own."""
    return Workload(name, *arguments, cgroup=cgroup)


def run(name: str, *arguments: object, cgroup: Path | None = None, seconds: float = PHASE_SECONDS) -> Mapping[str, int]:
    """Run a workload from its first event to its exit, in `cgroup`; the numbers of its "done" line."""
    with start(name, *arguments, cgroup=cgroup) as workload:
        workload.go()
        return workload.done(seconds=seconds)


@contextlib.contextmanager
def echo_server(*, address: str = "127.0.0.1", cgroup: Path | None = None) -> Iterator[int]:
    """A server that `connects` can talk to, in `cgroup`; its port."""
    with start("connects", "--serve", 0, address, cgroup=cgroup) as server:
        server.go()
        yield server.ready["port"]
        server.stop()
        server.done()


def cgroup2_mount() -> Path:
    """Where cgroup2 is mounted: /sys/fs/cgroup, or its `unified` folder beside v1 hierarchies."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(mount.split()[4])
    raise WorkloadError("no cgroup2 is mounted; run: mount -t cgroup2 cgroup2 /sys/fs/cgroup")


def cgroup_id(cgroup: Path) -> int:
    """What bpf_get_current_cgroup_id() says in it: the folder's inode number."""
    return cgroup.stat().st_ino


@contextlib.contextmanager
def in_cgroup(name: str) -> Iterator[Path]:
    """A new cgroup, `name` (which may have slashes) made unique; its processes are killed at the end."""
    top = cgroup2_mount() / f"probefleet-test-{os.getpid()}-{time.monotonic_ns()}"
    cgroup = top / name
    try:
        cgroup.mkdir(parents=True)
        yield cgroup
    finally:
        _remove(top)


def place(pid: int, cgroup: Path) -> None:
    """Move a process, with all its threads, into a cgroup."""
    (cgroup / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def loop_device(size_bytes: int = 1 << 20) -> Iterator[Path]:
    """A block device over memory: what reaches it reaches no other block device.

    Needs the loop driver and root; a guest of tests/kernel/vm loads the driver first.
    """
    if not Path("/dev/loop-control").exists():
        subprocess.run(["modprobe", "loop"], check=True)
    backing = Path("/dev/shm") / f"probefleet-loop-{os.getpid()}-{time.monotonic_ns()}"
    try:
        with backing.open("wb") as file:
            file.truncate(size_bytes)
        found = subprocess.run(
            ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False
        )
        if found.returncode:
            raise WorkloadError(f"no loop device: {found.stderr.strip()}")
        device = Path(found.stdout.strip())
        try:
            yield device
        finally:
            subprocess.run(["losetup", "--detach", str(device)], check=True)
    finally:
        backing.unlink(missing_ok=True)


def block_requests(device: Path) -> Requests:
    """What a device completed since it exists (Documentation/block/stat.rst)."""
    fields = [int(field) for field in Path("/sys/class/block", device.name, "stat").read_text().split()]
    return Requests(fields[0], fields[4], fields[2] * SECTOR_BYTES, fields[6] * SECTOR_BYTES)


def _asleep(pid: int) -> Switches | None:
    """The ledger of a process and its children, or None while one of its tasks runs."""
    woken = preempted = 0
    for task in Path("/proc", str(pid), "task").iterdir():
        facts = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        if not facts["State"].strip().startswith("S"):
            return None
        woken += int(facts["voluntary_ctxt_switches"])
        preempted += int(facts["nonvoluntary_ctxt_switches"])
        for child in (task / "children").read_text().split():
            below = _asleep(int(child))
            if below is None:
                return None
            woken, preempted = woken + below.woken, preempted + below.preempted
    return Switches(woken, preempted)


def _remove(top: Path) -> None:
    """Kill what is in a tree of cgroups, wait until the kernel says it is empty, remove it."""
    folders = sorted((path for path in [top, *top.rglob("*")] if path.is_dir()), reverse=True)
    for folder in folders:
        deadline = time.monotonic() + PHASE_SECONDS
        with (folder / "cgroup.events").open() as events:
            # cgroup.events reports POLLPRI when "populated" changes (Documentation/admin-guide/cgroup-v2.rst).
            changed = select.poll()
            changed.register(events, select.POLLPRI)
            while "populated 1" in (events.seek(0), events.read())[1]:
                for pid in (folder / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), 9)
                changed.poll(100)
                if time.monotonic() > deadline:
                    raise WorkloadError(f"{folder} does not become empty")
        folder.rmdir()
