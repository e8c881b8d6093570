"""Whose cgroups those are, as far as the node knows by now; and what the filters in the kernel are told of it.

The engine asks before it reads: ids that nobody has heard of make the tracker's map, and then the tree of cgroups, be
looked at again. ``pods.Book`` holds the answers; this module does the looking, and writes each instance's filter map.
Only cost depends on the filters: rows carry their cgroup and are judged when they are read (see ``pods``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence, Set

import numpy as np
import numpy.typing as npt
import structlog
from probefleet_wire.v1 import stream_pb2

from probefleet_agent.errors import ProbefleetError
from probefleet_agent.kernel import maps
from probefleet_agent.loaded import FILTER, Loaded, MapHandle
from probefleet_agent.pods import HOST, Answer, Book, CgroupId, PodUid, PolicyUid, Selected
from probefleet_agent.reconcile import Digest
from probefleet_agent.tracker import Tracker

log = structlog.get_logger("agent")

#: A cgroup that is gone is kept so long at least: connections and I/O that it began may end after it.
GONE_NS = 3_600_000_000_000
#: With the tracker's map more than half full, what may be forgotten is looked for this often.
_FORGET_EVERY_NS = 600_000_000_000
#: The tree is walked at most this often for ids that the tracker's map does not have.
_SCAN_EVERY_NS = 1_000_000_000


class Identities:
    """The node's book of cgroups, kept up with the kernel."""

    def __init__(self, tracker: Tracker, *, cgroup_root: str) -> None:
        self.tracker = tracker
        self.book = Book(root=cgroup_root)
        self._filters: dict[Digest, dict[CgroupId, Answer]] = {}
        self._scanned_ns = 0
        self._gone_since_ns: dict[CgroupId, int] = {}
        self._forgot_ns = 0

    def select(self, push: stream_pb2.Push) -> None:
        """Take in whom the policies of a push select."""
        self.learn(scan=not self._scanned_ns)
        self.book.select(
            {
                PolicyUid(each.policy_uid): Selected(
                    each.everything, frozenset(PodUid(uid) for uid in each.pod_uids), each.selector
                )
                for each in push.selections
            },
            [PodUid(uid) for uid in push.known_pod_uids],
        )

    def learn(self, *, scan: bool) -> None:
        """Take in what the tracker remembers; with ``scan`` also what the tree of cgroups holds now."""
        if scan:
            self.book.learn(self.tracker.scan())
            self._scanned_ns = time.time_ns()
        self.book.learn(self.tracker.paths())

    def know(self, cgroup_ids: Collection[int], now_ns: int) -> None:
        """Look again for cgroups that nobody has heard of: they came since the last look."""
        if all(cgroup in self.book.identities for cgroup in cgroup_ids):
            return
        self.learn(scan=False)
        if abs(now_ns - self._scanned_ns) > _SCAN_EVERY_NS and any(
            cgroup not in self.book.identities for cgroup in cgroup_ids
        ):
            self.learn(scan=True)

    def forget_gone(self, now_ns: int, in_use: Callable[[], Set[int]]) -> int:
        """Where room for new cgroups gets short, forget those that ended an hour ago and that no map and no record
        holds (``in_use``): whose a count is must be known as long as there is the count. Returns how many went.
        """
        if not self.tracker.crowded or abs(now_ns - self._forgot_ns) < _FORGET_EVERY_NS:
            return 0
        self._forgot_ns = now_ns
        remembered = self.tracker.paths()  # before the tree: what comes in between is in neither
        gone = remembered.keys() - self.tracker.scan().keys()
        # Of a moment that is yet to come the clock was set back.
        self._gone_since_ns = {cgroup: min(self._gone_since_ns.get(cgroup, now_ns), now_ns) for cgroup in gone}
        ripe = {cgroup for cgroup, since_ns in self._gone_since_ns.items() if now_ns - since_ns >= GONE_NS}
        if ripe:
            try:
                ripe -= in_use()
            except ProbefleetError as error:
                # Nobody knows what that map holds: whose its counts are must stay known.
                log.warning("cgroups that went are kept, since not all maps can be read", error=str(error))
                return 0
            self.tracker.forget(ripe)
            self.book.forget(ripe)
            for cgroup in ripe:
                del self._gone_since_ns[cgroup]
        return len(ripe)

    def needs_filter(self, policies: Sequence[PolicyUid]) -> bool:
        """Is there anything that an instance of these policies may leave out?"""
        selections = [self.book.selections.get(uid) for uid in policies]
        return self.book.root != "/" or not all(each and each.everything for each in selections)

    def fill_filter(self, loaded: Loaded, policies: Sequence[PolicyUid]) -> None:
        """Tell an instance's programs which cgroups are refused."""
        handle = loaded.maps.get(FILTER)
        if handle is None:
            return
        written = self._filters.setdefault(Digest(loaded.digest), _read_filter(handle))
        forgotten = [cgroup for cgroup in written if cgroup not in self.book.identities]
        if forgotten:
            maps.delete_many(handle.fd, _as_keys(forgotten))
            for cgroup in forgotten:
                del written[cgroup]
        fresh = {}
        for cgroup in self.book.identities:
            answer = self.book.joint_answer(policies, cgroup)
            if answer != written.get(cgroup, Answer.UNKNOWN):
                fresh[cgroup] = answer
        # One that is there changes; others find room, or stay unknown.
        room = handle.info.max_entries - len(written)
        told = [cgroup for cgroup in fresh if cgroup in written]
        told += [cgroup for cgroup in fresh if cgroup not in written][:room]
        if told:
            values = np.array([fresh[cgroup] for cgroup in told], np.uint8).reshape(-1, 1)
            maps.update_many(handle.fd, _as_keys(told), values)
            written.update((cgroup, fresh[cgroup]) for cgroup in told)

    def groups_of_pods(self, policies: Sequence[PolicyUid]) -> dict[str, list[str]]:
        """Pod uid → paths of its cgroups, of all pods that any of these policies selects."""
        found: dict[str, list[str]] = {}
        for cgroup, path in self.tracker.paths().items():
            identity = self.book.identities.get(cgroup)
            if identity is None or identity.pod == HOST:
                continue
            if self.book.joint_answer(policies, cgroup) == Answer.SELECTED:
                found.setdefault(identity.pod, []).append(path)
        return found

    def forget_filter(self, digest: Digest) -> None:
        """The instance is gone."""
        self._filters.pop(digest, None)


def _read_filter(handle: MapHandle) -> dict[CgroupId, Answer]:
    """What an earlier process told the programs."""
    keys, values = maps.read(handle.fd, handle.info)
    ids = np.ascontiguousarray(keys).view(np.uint64).reshape(-1).tolist()
    return {CgroupId(cgroup): Answer(value) for cgroup, value in zip(ids, values[:, 0].tolist(), strict=True)}


def _as_keys(cgroups: Sequence[CgroupId]) -> npt.NDArray[np.uint8]:
    return np.array(cgroups, np.uint64).view(np.uint8).reshape(-1, 8)
