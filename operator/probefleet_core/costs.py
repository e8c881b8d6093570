"""What one policy's instance costs on every node. Pure.

The kernel counts a program's run time only while statistics are on, so shares are differences: run time
gained ÷ time that statistics were on. To that comes the hooks' own time, measured on the node, which the
kernel does not see.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from probefleet_wire.v1 import stream_pb2

from probefleet_core import departed
from probefleet_core.result import Cost


@dataclass(slots=True)
class NodeCost:
    """The newest statistics of one node, and what they say about the time since the ones before."""

    digest: str = ""
    time_ns: int = 0
    runs: int = 0
    run_time_ns: int = 0
    hook_time_ns: int = 0
    stats_time_ns: int = 0
    agent_cpu_ns: int = 0
    known: bool = False
    measuring: bool = False  # statistics can be read, and were not on for long enough yet
    cores: float = 0.0
    runs_per_second: float = 0.0
    agent_cores: float = 0.0
    agent_rss_bytes: int = 0
    map_bytes: int = 0
    missed: int = 0
    missed_in: tuple[str, int] = ("", 0)  # the epoch, and what was missed in it before the policy joined
    missed_told: int = 0  # of ``missed``, before the node had left and came back: retired
    shared_by: int = 1


class Costs:
    """Costs of one policy, by node."""

    __slots__ = ("_missed_before", "_nodes", "_retired_missed")

    def __init__(self) -> None:
        self._nodes: dict[str, NodeCost] = {}
        self._retired_missed = 0
        self._missed_before: departed.Remembered[int] = departed.Remembered()  # by epoch and when the policy joined

    def apply(self, node: str, policy_uid: str, stat: stream_pb2.InstanceStat, batch: stream_pb2.Batch) -> None:
        """Take in a node's statistics, for this policy."""
        state = self._nodes.setdefault(node, NodeCost())
        another = stat.digest != state.digest or stat.runs < state.runs or stat.stats_time_ns < state.stats_time_ns
        if another:
            # Another instance, or the same loaded anew: it counts from zero.
            state.runs = state.run_time_ns = state.hook_time_ns = state.stats_time_ns = 0
            state.digest = stat.digest
        before = stat.misses_before.get(policy_uid, 0)
        if state.missed_in != (stat.epoch, before):
            self._retired_missed += state.missed - state.missed_told
            state.missed_in = (stat.epoch, before)
            state.missed = state.missed_told = self._missed_before.get(node, f"{stat.epoch} {before}") or 0
        state.missed = max(stat.recursion_misses - before, state.missed)
        on_ns = stat.stats_time_ns - state.stats_time_ns
        if on_ns > 0:
            runs = stat.runs - state.runs
            state.runs_per_second = runs / (on_ns / 1e9)
            hook_ns = max(stat.hook_time_ns - state.hook_time_ns, 0)
            state.cores = (max(stat.run_time_ns - state.run_time_ns, 0) + hook_ns) / on_ns
        # Kept only where it was known when statistics were on: a share of before is better than none.
        state.known = stat.cost_known and stat.stats_time_ns > 0
        state.measuring = stat.cost_known and not stat.stats_time_ns
        state.runs, state.run_time_ns, state.hook_time_ns = stat.runs, stat.run_time_ns, stat.hook_time_ns
        state.stats_time_ns = stat.stats_time_ns
        elapsed_ns = batch.time_ns - state.time_ns
        if state.time_ns and elapsed_ns > 0 and batch.agent_cpu_ns >= state.agent_cpu_ns:
            state.agent_cores = (batch.agent_cpu_ns - state.agent_cpu_ns) / elapsed_ns
        state.time_ns, state.agent_cpu_ns = batch.time_ns, batch.agent_cpu_ns
        state.agent_rss_bytes, state.map_bytes = batch.agent_rss_bytes, stat.map_bytes
        state.shared_by = max(len(stat.policy_uids), 1)

    @property
    def missed(self) -> int:
        """Runs that the kernel skipped, because the program was already running there."""
        return self._retired_missed + sum(state.missed - state.missed_told for state in self._nodes.values())

    def fold(self, node: str) -> None:
        """The node has left for good: of its cost only the runs that were skipped are kept."""
        state = self._nodes.pop(node, None)
        if state is not None and state.missed:
            self._retired_missed += state.missed - state.missed_told
            self._missed_before.keep(node, f"{state.missed_in[0]} {state.missed_in[1]}", state.missed)

    def result(self, fresh: Iterable[str]) -> Cost:
        """The whole fleet's cost, of nodes with a fresh sample."""
        here = {node: self._nodes[node] for node in fresh if node in self._nodes}
        if not here:
            return Cost()
        known = {node: state for node, state in here.items() if state.known}
        measuring = sum(state.measuring for state in here.values())
        worst = max(known, key=lambda node: (known[node].cores, node), default="")
        return Cost(
            known_nodes=len(known),
            measuring_nodes=measuring,
            unknown_nodes=len(here) - len(known) - measuring,
            max_cores=known[worst].cores if worst else 0.0,
            max_node=worst,
            mean_cores=sum(state.cores for state in known.values()) / len(known) if known else 0.0,
            runs_per_second=sum(state.runs_per_second for state in here.values()),
            runs_known=_runs_known(list(here.values())),
            max_map_bytes=max(state.map_bytes for state in here.values()),
            total_map_bytes=sum(state.map_bytes for state in here.values()),
            max_agent_cores=max(state.agent_cores for state in here.values()),
            mean_agent_cores=sum(state.agent_cores for state in here.values()) / len(here),
            max_agent_rss_bytes=max(state.agent_rss_bytes for state in here.values()),
            shared_by=max(state.shared_by for state in here.values()),
        )


def _runs_known(here: list[NodeCost]) -> bool:
    """Is the sum of the runs the fleet's? Not where a node will never tell, nor before most of them have."""
    telling = sum(state.stats_time_ns > 0 for state in here)
    mute = any(not state.stats_time_ns and not state.measuring for state in here)
    return not mute and 2 * telling > len(here)
