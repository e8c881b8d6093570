"""One machine's measurement: an engine and an aggregate for each policy, from the push to the last report.

``run`` and ``check`` call it with what ``preparation`` made. The engine is the agent's own, in this process; its
batches take the same way as in a cluster: merged by ``aggregate``, put into a ProbeReport's status by ``report``.
Single-threaded: whoever opened a ``Measurement`` calls all of it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from probefleet_agent import errors as agent_errors
from probefleet_agent.kernel import mounts
from probefleet_core import aggregate, report, result
from probefleet_wire.v1 import stream_pb2

from probefleet_cli import local_pods, preparation, workspace
from probefleet_cli.failures import BadInput, Failure, KernelRefuses

SESSION = 1
LOG_LINES = 6
NEEDS_ROOT = "Loading programs needs root: sudo probefleet …; probefleet doctor tells more"
BROKEN = (stream_pb2.PolicyStatus.FAILED, stream_pb2.PolicyStatus.DETACHED)
#: Reasons that are the policy's own, and the same on any machine: its C does not compile, or does more than observe.
OF_THE_POLICY = frozenset({"CompileFailed", "NotObserveOnly"})
#: Programs go on while the rings are emptied; a reading takes up to 4 MiB.
MAX_LAST_READINGS = 32


class Engine(Protocol):
    """What is used of probefleet_agent.engine.Engine."""

    def apply(self, push: stream_pb2.Push) -> None:
        """Make this machine run exactly the push."""

    def status(self) -> stream_pb2.Status:
        """What came of it, by policy."""

    def collect(self, now_ns: int, *, force: bool = False, complete: bool = True) -> stream_pb2.Batch | None:
        """What is due (all, by ``force``, and ``complete`` what processes print each second); None where nothing is."""

    def acknowledge(self, sequence: int) -> None:
        """All batches up to this one are merged."""

    def remove_everything(self) -> None:
        """Detach and unpin."""


class Pods(Protocol):
    """What is used of pod_watch.Watch."""

    pods: local_pods.LocalPods
    """Everything known by now; another object when there is news."""

    def look(self) -> None:
        """Look now."""


@dataclass(slots=True)
class Nobody:
    """No pods, for who only wants to know whether a policy loads."""

    pods: local_pods.LocalPods = field(default_factory=local_pods.LocalPods)

    def look(self) -> None:
        """There is nothing to see."""


Opener = Callable[[Path, str], contextlib.AbstractContextManager[Engine]]
"""(folder in bpffs, cgroup root) → an engine."""


def open_engine(folder: Path, cgroup_root: str) -> contextlib.AbstractContextManager[Engine]:
    """The agent's engine; imported late, because `--help` needs none of it."""
    from probefleet_agent import engine

    return engine.Engine.open(bpffs=folder, cgroup_root=cgroup_root, node=node_name())


def node_name() -> str:
    """What this machine is called in reports."""
    return platform.node() or "localhost"


@dataclass(slots=True)
class Measurement:
    """Policies that run here. ``prepared`` and ``statuses`` have the same order."""

    engine: Engine
    prepared: Sequence[preparation.Prepared]
    watch: Pods
    namespace: str | None = None
    pods: local_pods.LocalPods = field(default_factory=local_pods.LocalPods)
    aggregates: list[aggregate.Aggregate] = field(default_factory=list)
    _version: int = 0
    _told: object = None

    def __post_init__(self) -> None:
        self.aggregates = [aggregate.Aggregate(result.PolicyFacts.of(each.planned.plan)) for each in self.prepared]
        self._take_in_pods()

    def statuses(self) -> list[stream_pb2.PolicyStatus]:
        """What the engine says of each policy; PENDING of one that it does not speak of."""
        said = {status.policy_uid: status for status in self.engine.status().policies}
        return [
            said.get(each.policy.uid, stream_pb2.PolicyStatus(state=stream_pb2.PolicyStatus.PENDING))
            for each in self.prepared
        ]

    def sample(self, *, force: bool = False, complete: bool = True) -> stream_pb2.Batch | None:
        """Read what is due and merge it; the batch, where there was anything."""
        self._take_in_pods()
        batch = self.engine.collect(time.time_ns(), force=force, complete=complete)
        if batch is not None:
            received_ns = time.time_ns()
            for each in self.aggregates:
                each.apply(node_name(), SESSION, batch, received_ns)
            self.engine.acknowledge(batch.sequence)
        return batch

    def sample_rest(self) -> None:
        """The last reading: all maps once, and rings until they are empty or a bound is reached."""
        self.watch.look()  # whose they are, as of now
        for reading in range(MAX_LAST_READINGS):
            # Once is enough for what bpftrace prints each second: a script that prints as often would never be done.
            batch = self.sample(force=True, complete=not reading)
            if batch is None or not batch.events:
                return

    def results(self) -> list[result.Result]:
        """Each policy's result of now."""
        now_ns, here = time.time_ns(), frozenset({node_name()})
        return [each.result(now_ns, selected_nodes=here, names=self.pods.name_of) for each in self.aggregates]

    def reports(self) -> list[report.Json]:
        """Each policy's ProbeReport status, as a cluster would write it."""
        return [report.status(each) for each in self.results()]

    def chosen(self) -> list[tuple[str, ...] | None]:
        """For each policy the pods that it has counted, by uid; None where it counts everybody."""
        return [preparation.selected(each.policy, self.pods, self.namespace) for each in self.prepared]

    def _take_in_pods(self) -> None:
        """What is new about pods: names for reports, and the engine is told where it changes who counts."""
        if self.watch.pods is self.pods and self._version:
            return
        self.pods = self.watch.pods
        chosen = self.chosen()
        judged = preparation.judged(self.prepared, self.pods, self.namespace)
        tell = (chosen, judged if any(each is not None for each in chosen) else None)
        if self._version and tell == self._told:
            return
        self._told, self._version = tell, self._version + 1
        made = preparation.push(self.prepared, pods=self.pods, namespace=self.namespace, version=self._version)
        self.engine.apply(made)


@contextlib.contextmanager
def measure(
    prepared: Sequence[preparation.Prepared],
    *,
    watch: Pods | None = None,
    bpffs: Path = mounts.BPFFS,
    cgroup_root: str = "/",
    namespace: str | None = None,
    opener: Opener = open_engine,
) -> Iterator[Measurement]:
    """Load, attach and count; leaving it detaches and removes everything. Failure where the machine forbids it.

    ``watch`` says who is here (None: nobody asks); ``namespace`` is whose pods each policy counts, whatever it says.
    """
    try:
        mounts.mount_tracefs()
        with workspace.open_private(bpffs) as folder, opener(folder, cgroup_root) as engine:
            try:
                yield Measurement(engine, prepared, watch or Nobody(), namespace)
            finally:
                engine.remove_everything()
    except agent_errors.ProbefleetError as error:
        if os.geteuid() and error.reason == "NotPermitted":
            raise Failure(NEEDS_ROOT) from error
        raise KernelRefuses(f"this machine does not allow it: {error}. probefleet doctor tells more") from error
    except PermissionError as error:
        raise Failure(f"{error}. {NEEDS_ROOT}") from error


def failed(statuses: Sequence[stream_pb2.PolicyStatus], message: str) -> Failure:
    """How a command ends: by status 2 where it is only policies that are at fault, else by 3."""
    broken = [status for status in statuses if status.state in BROKEN]
    if broken and all(status.reason in OF_THE_POLICY for status in broken):
        return BadInput(message)
    return KernelRefuses(message)


def refusal(each: preparation.Prepared, status: stream_pb2.PolicyStatus, *, whole_log: bool = False) -> str:
    """Why this kernel does not run a policy: reason and message, and the verifier's log where it has one."""
    text = f"{each.where}: {status.reason or 'Failed'}: {status.message or 'the engine gave no reason'}"
    if not status.log_tail:
        return text
    lines = status.log_tail.rstrip().splitlines()
    if whole_log or len(lines) <= LOG_LINES:
        return "\n".join([text, *(f"    {line}" for line in lines)])
    word = each.where.removeprefix("catalog ").partition(", object ")[0]
    word = "FILE" if word == "standard input" else word
    return "\n".join(
        [text, "    …", *(f"    {line}" for line in lines[-LOG_LINES:]), f"Whole log: probefleet check -v {word}"]
    )
