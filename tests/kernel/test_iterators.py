"""Iterators and syscall programs, run each interval: lines and structs as events and gauges, and maps filled."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
import zstandard
from probefleet_agent.engine import Engine
from probefleet_agent.kernel import features, interfaces, links, mounts
from probefleet_core import catalog, planner, policy
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.kernel import examples_runner, network, support

# An emulated machine takes minutes for what starts a command.
pytestmark = pytest.mark.timeout(400)

PRELUDE = """
#include <probefleet.h>
char LICENSE[] SEC("license") = "GPL";
"""
LINES = """
const volatile u32 wanted = %d;
SEC("iter/task")
int dump(struct bpf_iter__task *ctx)
{
	static const char format[] = "pid %%d tid %%d\\n";
	struct task_struct *task = ctx->task;
	u64 arguments[2];

	if (!task || task->tgid != wanted)
		return 0;
	arguments[0] = task->tgid;
	arguments[1] = task->pid;
	bpf_seq_printf(ctx->meta->seq, format, sizeof(format), arguments, sizeof(arguments));
	return 0;
}
"""
# Run i is what the syscall program counts, and what the iterator finds when it begins.
COUNTED = """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, comm_t); __type(value, u64); }
seen SEC(".maps");

SEC("syscall")
int tick(void *ctx)
{
	comm_t name = "runs";

	probefleet_add(&seen, name, 1);
	return 0;
}

SEC("iter/task")
int count(struct bpf_iter__task *ctx)
{
	comm_t first = "readings", threads = "threads";
	struct task_struct *task = ctx->task;

	if (ctx->meta->seq_num == 0)
		probefleet_add(&seen, first, 1);
	if (task && task->tgid == %d)
		probefleet_add(&seen, threads, 1);
	return 0;
}
"""


class Node:
    """An engine on this machine with one policy, planned as the operator plans it; time is the test's."""

    def __init__(self, folder: Path, source: str, *outputs: dict[str, object]) -> None:
        manifest = {
            "apiVersion": policy.API_VERSION, "kind": "ProbePolicy", "metadata": {"name": "iterators"},
            "spec": {"scope": "Cluster", "program": {"c": {"source": source}}, "interval": "10s",
                     "outputs": list(outputs)},
        }  # fmt: skip
        elf = support.compile_object(PRELUDE + source, prelude=False)
        self.planned = planner.plan(policy.parse_policy(manifest), catalog=catalog.Catalog({}), elf=elf, probe_maps={})
        self.folder, self.now_ns = folder, 10_000_000_000
        self.engine = Engine.open(bpffs=folder)
        self.start()

    def start(self) -> None:
        blobs = [stream_pb2.Blob(sha256=name, zstd=zstandard.compress(d)) for name, d in self.planned.objects.items()]
        uid = self.planned.plan.policy_uid
        self.engine.hello()
        self.engine.apply(
            stream_pb2.Push(
                term=1,
                version=self.engine._version + 1,
                plans=[self.planned.plan],
                blobs=blobs,
                selections=[stream_pb2.Selection(policy_uid=uid, everything=True)],
            )
        )
        (status,) = self.engine.status().policies
        assert status.state == stream_pb2.PolicyStatus.READY, status.message

    def again(self) -> None:
        """As after `kill -9`: another agent takes over what is pinned."""
        self.engine.close()
        self.engine = Engine.open(bpffs=self.folder)
        self.start()

    def interval(self) -> stream_pb2.Batch:
        """What the next interval measures."""
        self.now_ns += 10_000_000_000
        batch = self.engine.collect(self.now_ns)
        assert batch is not None
        self.engine.acknowledge(batch.sequence)
        return batch


@pytest.fixture
def folder() -> Iterator[Path]:
    path = mounts.mount_bpffs() / f"probefleet-test-iterators-{os.getpid()}"
    path.mkdir()
    yield path
    with Engine.open(bpffs=path) as engine:
        engine.remove_everything()
    path.rmdir()


@contextlib.contextmanager
def node(folder: Path, source: str, *outputs: dict[str, object]) -> Iterator[Node]:
    made = Node(folder, source, *outputs)
    try:
        yield made
    finally:
        made.engine.close()


def lines(batch: stream_pb2.Batch) -> list[str]:
    """The lines of the batch's one chunk."""
    (chunk,) = batch.events
    (found,) = [each for each in chunk.columns if each.name == "line"]
    count = len(columns.unpack(chunk.positions, limit=1 << 20))
    return list(map(str, columns.read_column(found, count)))


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process with 23 threads and 997 open files besides its three."""
    source = """
import os, sys, threading
files = [open("/dev/null") for _ in range(997)]
done = threading.Event()
for _ in range(22):
    threading.Thread(target=done.wait).start()
print("ready", flush=True)
sys.stdin.read()
os._exit(0)
"""
    process = subprocess.Popen([sys.executable, "-c", source], stdin=PIPE, stdout=PIPE, text=True)
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.mark.shows("attach/iterator")
def test_lines_are_events_each_interval_and_after_a_restart(folder: Path, child: subprocess.Popen[str]) -> None:
    with node(folder, LINES % child.pid) as made:
        expected = sorted(f"pid {child.pid} tid {name}" for name in os.listdir(f"/proc/{child.pid}/task"))
        assert len(expected) == 23
        assert sorted(lines(made.interval())) == expected
        assert sorted(lines(made.interval())) == expected
        made.again()
        assert sorted(lines(made.interval())) == expected


@pytest.mark.shows("attach/interval")
def test_iterators_and_syscall_programs_run_once_an_interval_before_maps_are_read(
    folder: Path, child: subprocess.Popen[str]
) -> None:
    support.needs(features.syscall_programs)
    with node(folder, COUNTED % child.pid) as made:
        for number in range(1, 4):
            (table,) = made.interval().tables
            totals = columns.unpack(table.values, limit=1 << 20).tolist()
            assert sorted(totals) == [number, number, 23 * number]


@pytest.mark.shows("example/tcp-sockets")
def test_tcp_sockets_are_counted_by_state_in_the_nodes_network() -> None:
    with network.namespace() as here, interfaces.entered(here), contextlib.ExitStack() as stack:
        network.ip("link", "set", "lo", "up")
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(23)]
        address = listening[0].getsockname()
        for _ in range(7):
            stack.enter_context(socket.create_connection(address))
        with examples_runner.running("tcp-sockets.yaml", links=1) as run:
            pass
        # Connected and not accepted: both ends are established, and seven wait.
        assert run.rows("tcp-sockets", "sockets") == {("LISTEN",): 23, ("ESTABLISHED",): 14}
        waiting = run.rows("tcp-sockets", "waiting")
        assert waiting.pop((str(address[1]),)) == 7
        assert set(waiting.values()) == {0}


UDP = """
SEC("iter/udp")
int dump(struct bpf_iter__udp *ctx)
{
	static const char format[] = "udp %u\\n";
	struct udp_sock *socket = ctx->udp_sk;
	u64 port;

	if (!socket)
		return 0;
	port = socket->inet.sk.__sk_common.skc_num;
	bpf_seq_printf(ctx->meta->seq, format, sizeof(format), &port, sizeof(port));
	return 0;
}
"""
MAPS = """
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 7919); __type(key, u32); __type(value, u64); }
mine SEC(".maps");
SEC("iter/bpf_map")
int dump(struct bpf_iter__bpf_map *ctx)
{
	static const char format[] = "map of %u\\n";
	struct bpf_map *map = ctx->map;
	u32 zero = 0;
	u64 entries;

	bpf_map_lookup_elem(&mine, &zero);
	if (!map || map->max_entries != 7919)
		return 0;
	entries = map->max_entries;
	bpf_seq_printf(ctx->meta->seq, format, sizeof(format), &entries, sizeof(entries));
	return 0;
}
"""


def test_udp_sockets_of_the_nodes_network_are_lines(folder: Path) -> None:
    with network.namespace() as here, interfaces.entered(here), contextlib.ExitStack() as stack:
        network.ip("link", "set", "lo", "up")
        ports = []
        for _ in range(23):
            made = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            made.bind(("127.0.0.1", 0))
            ports.append(made.getsockname()[1])
        measured = stack.enter_context(node(folder, UDP))
        assert sorted(lines(measured.interval())) == sorted(f"udp {port}" for port in ports)


def test_maps_are_lines(folder: Path) -> None:
    output = {"name": "maps", "from": {"map": "dump"}, "events": {}}
    with node(folder, MAPS, output) as measured:
        assert lines(measured.interval()) == ["map of 7919"]


@pytest.mark.shows("example/open-files")
def test_open_files_are_counted_by_process(child: subprocess.Popen[str]) -> None:
    with examples_runner.running("open-files.yaml", links=1) as run:
        pass
    rows = run.rows("open-files", "files")
    (mine,) = [count for (process,), count in rows.items() if str(child.pid) in process]
    assert mine == len(os.listdir(f"/proc/{child.pid}/fd")) == 1000


def test_an_iterator_that_is_not_there_is_named_with_those_that_are() -> None:
    target = plan_pb2.Attachment(program="it", iterator=plan_pb2.Iterator(type="tasks"))
    assert "no iterator tasks on this kernel; near: task" in str(links.supported(target, program_section="iter/tasks"))
    target.iterator.type = "bpf_map_elem"
    assert "read the map by an output" in str(links.supported(target, program_section="iter/bpf_map_elem"))


def test_a_program_of_another_kind_is_not_run_each_interval() -> None:
    target = plan_pb2.Attachment(program="it", interval=plan_pb2.Interval())
    assert 'that is for SEC("syscall")' in str(links.supported(target, program_section="kprobe/x"))
