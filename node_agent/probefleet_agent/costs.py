"""What the programs cost on this node: run counts and times of the kernel's own statistics, in sampled windows.

To that comes what the kernel does not see, the way to the program: runs × what its hook was measured to cost here
(``kernel.hooks``).

The kernel counts runs only while somebody asks for it (``BPF_ENABLE_STATS``), and counting costs some 20 ns a run:
so it is on for one second of ten. The engine ticks; a window that ends adds to each instance's sums, and an
instance that was over its budget for ``STRIKES`` windows in a row is named, to be detached. Without CAP_SYS_ADMIN, or
with a hook that cannot be measured, the cost is unknown, and said so: a figure that is too low would be worse.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probefleet_wire.v1 import stream_pb2

from probefleet_agent.errors import ProbefleetError
from probefleet_agent.kernel import clock, syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.loaded import Loaded, Runs
from probefleet_agent.reconcile import Digest

WINDOW_NS = 1_000_000_000
EVERY_NS = 10_000_000_000
STRIKES = 3


@dataclass(slots=True)
class Sums:
    """What an instance's windows came to."""

    runs: int = 0
    run_time_ns: int = 0
    hook_time_ns: int = 0
    stats_time_ns: int = 0
    over: int = 0


class Costs:
    """Statistics of all instances."""

    def __init__(self, *, enabled: bool) -> None:
        self._wanted = enabled
        self._fd: Fd | None = None
        self._opened_ns = 0
        self._next_ns = 0
        self._at_open: dict[Digest, Runs] = {}
        self._sums: dict[Digest, Sums] = {}
        #: Instances whose first window is over since somebody asked: their cost is news.
        self._fresh: set[Digest] = set()

    @property
    def known(self) -> bool:
        """False where the kernel does not let us."""
        return self._wanted

    def tick(
        self, now_ns: int, loaded: Mapping[Digest, Loaded], budgets: Mapping[Digest, int], *, force: bool = False
    ) -> list[Digest]:
        """Open or close a window where it is time; the instances that went over their budget once too often."""
        if not self._wanted:
            return []
        if self._fd is None:
            if loaded and not self._next_ns - EVERY_NS <= now_ns < self._next_ns:  # or the clock was set back
                self._open(loaded)
                self._next_ns = now_ns + EVERY_NS
            return []
        if time.monotonic_ns() - self._opened_ns < WINDOW_NS and not force:
            return []
        return self._shut(loaded, budgets)

    def stat(self, loaded: Loaded, policy_uids: Sequence[str]) -> stream_pb2.InstanceStat:
        """For a batch."""
        sums, now = self._sums.get(Digest(loaded.digest), Sums()), loaded.runs()
        return stream_pb2.InstanceStat(
            digest=loaded.digest, runs=sums.runs, run_time_ns=sums.run_time_ns, hook_time_ns=sums.hook_time_ns,
            stats_time_ns=sums.stats_time_ns, cost_known=self._wanted and not (loaded.unmeasured or loaded.running),
            map_bytes=loaded.map_bytes, recursion_misses=now.recursion_misses, policy_uids=sorted(policy_uids),
            misses_before={uid: joined.misses for uid, joined in loaded.joined.items() if joined.misses},
            epoch=f"{clock.boot_id()}:{now.first_program}",
        )  # fmt: skip

    def take_fresh(self) -> set[Digest]:
        """Instances whose first window has ended since the last call: their cost waits for no policy's interval."""
        fresh, self._fresh = self._fresh, set()
        return fresh

    def begin_anew(self, digest: Digest) -> None:
        """Its programs were loaded or attached again: no window until now says anything of them."""
        self._at_open.pop(digest, None)
        if sums := self._sums.get(digest):
            sums.over = 0

    def forget(self, digest: Digest) -> None:
        """The instance is gone."""
        self._sums.pop(digest, None)
        self._at_open.pop(digest, None)
        self._fresh.discard(digest)

    def close(self) -> None:
        """Statistics off."""
        if self._fd is not None:
            self._fd.close()
            self._fd = None

    def _open(self, loaded: Mapping[Digest, Loaded]) -> None:
        try:
            self._fd = syscall.enable_stats()
        except ProbefleetError:
            # No CAP_SYS_ADMIN, or before Linux 5.8: the report says that the cost is not known.
            self._wanted = False
            return
        self._opened_ns = time.monotonic_ns()
        self._at_open = {digest: each.runs() for digest, each in loaded.items()}

    def _shut(self, loaded: Mapping[Digest, Loaded], budgets: Mapping[Digest, int]) -> list[Digest]:
        # Differences over our own window: other readers may have statistics on as well.
        elapsed_ns = time.monotonic_ns() - self._opened_ns
        over: list[Digest] = []
        for digest, each in loaded.items():
            now = each.runs()
            sums = self._sums.setdefault(digest, Sums())
            if digest not in self._at_open:
                continue
            before = self._at_open[digest]
            if not sums.stats_time_ns:
                self._fresh.add(digest)
            sums.runs += now.count - before.count
            sums.run_time_ns += now.time_ns - before.time_ns
            sums.hook_time_ns += now.hook_time_ns - before.hook_time_ns
            sums.stats_time_ns += elapsed_ns
            busy_ns = now.time_ns - before.time_ns + now.hook_time_ns - before.hook_time_ns
            millicores = busy_ns * 1000 / elapsed_ns
            budget = budgets.get(digest, 0)
            sums.over = sums.over + 1 if budget and millicores > budget else 0
            if sums.over >= STRIKES and not each.detached:
                each.detached = (
                    f"its programs and their hooks took {millicores:.1f}m of CPU on this node, {STRIKES} times in a "
                    f"row; the budget is {budget}m. Detached; what was counted stays. Narrow the policy or raise "
                    "budget.cpu."
                )
                over.append(digest)
        self.close()
        return over
