"""Whose cgroup is it? From cgroup ids to pods and containers, and from selections to the answer of the filter. Pure.

In: paths of cgroups, as ``kernel.cgroups`` scans them and the pinned map ``cgroups`` remembers them (also of those
that are gone), and the pods that a push names. Out: for each cgroup an ``Identity``, and for each policy which
cgroups count. The engine calls this before it reads maps. Three answers, never two: *selected*, *refused*, and
*unknown*, which is kept until identity comes (a pod may run before the operator has told this node about it).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NewType

CgroupId = NewType("CgroupId", int)
PodUid = NewType("PodUid", str)
PolicyUid = NewType("PolicyUid", str)

#: What stands in the column ``pod_uid`` for processes outside any pod, and for cgroups that nobody knows (yet).
HOST = PodUid("")
UNKNOWN = PodUid("?")

# cgroupfs: …/kubepods/burstable/pod<uid>/<container>; systemd: …-pod<uid with _>.slice/cri-containerd-<container>.scope
# The uid of a static pod is its manifest's MD5, without dashes (kubelet, pkg/kubelet/config/common.go).
_UID = r"[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"
_POD = re.compile(rf"(?:^|/)(?:[a-z0-9-]+-)?pod(?P<uid>{_UID})(?:\.slice)?(?:/(?P<rest>.*))?$")
_CONTAINER = re.compile(r"^(?:[a-z-]+-)?(?P<id>[0-9a-f]{64})(?:\.scope)?(?:/|$)")


class Answer(enum.IntEnum):
    """What the filter says of a cgroup; the numbers are those of ``probefleet_filter``."""

    UNKNOWN = 0
    SELECTED = 1
    REFUSED = 2


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose a cgroup is. ``pod`` is ``HOST`` outside pods; ``inside`` is false outside this node's own cgroup root."""

    pod: PodUid
    container: str
    inside: bool = True


OUTSIDE = Identity(HOST, "", inside=False)


def identify(path: str, *, root: str = "/") -> Identity:
    """Read an identity off a cgroup's path (from the hierarchy's root, as ``/proc/PID/cgroup`` shows it)."""
    base = root.rstrip("/")
    if base and path != base and not path.startswith(base + "/"):
        return OUTSIDE
    found = _POD.search(path)
    if not found:
        return Identity(HOST, "")
    container = _CONTAINER.match(found["rest"] or "")
    return Identity(PodUid(found["uid"].replace("_", "-")), container["id"] if container else "")


@dataclass(frozen=True, slots=True)
class Selected:
    """One policy's pods on this node."""

    everything: bool
    pods: frozenset[PodUid]
    selector: str = ""  # empty: as before


@dataclass(slots=True)
class Book:
    """Every cgroup that this node has seen since the identity program was pinned, and whom the policies select."""

    root: str = "/"
    identities: dict[CgroupId, Identity] = field(default_factory=dict)
    selections: dict[PolicyUid, Selected] = field(default_factory=dict)
    known_pods: frozenset[PodUid] = frozenset()
    #: Has the operator named its pods in this stream? What it has not named cannot be waited for before.
    current: bool = False
    # A pod that counted once goes on counting after it is gone from the operator's lists: its counts stay true. Other
    # labels end that, and so does another selector: it may have selected others.
    _ever: dict[PolicyUid, set[PodUid]] = field(default_factory=dict)
    _selectors: dict[PolicyUid, str] = field(default_factory=dict)
    _turns: dict[PolicyUid, int] = field(default_factory=dict)

    def learn(self, paths: Mapping[CgroupId, str]) -> int:
        """Take in cgroups; returns how many were new. An id never changes its meaning within a boot."""
        new = [cgroup for cgroup in paths if cgroup not in self.identities]
        for cgroup in new:
            self.identities[cgroup] = identify(paths[cgroup], root=self.root)
        return len(new)

    def forget(self, gone: Iterable[CgroupId]) -> None:
        """These are gone, and nothing speaks of them any more."""
        for cgroup in gone:
            self.identities.pop(cgroup, None)

    def restart_stream(self) -> None:
        """A new stream: its operator has named no pods yet; those that were named before still are."""
        self.current = False

    def select(self, selections: Mapping[PolicyUid, Selected], known_pods: Iterable[PodUid]) -> None:
        """Take in the selections of a push."""
        self.current = True
        self.selections = dict(selections)
        # An operator that is new does not know pods of before. Who was named once, and not selected, stays refused for
        # as long as something here speaks of it.
        remembered = self.known_pods & {identity.pod for identity in self.identities.values()}
        known = frozenset(known_pods)
        self.known_pods = known | remembered
        for policy in list(self._ever):
            if policy not in self.selections:
                del self._ever[policy]
                self._turns.pop(policy, None)
                self._selectors.pop(policy, None)
        for policy, selected in self.selections.items():
            ever = self._ever.setdefault(policy, set())
            if selected.selector and self._selectors.get(policy) != selected.selector:
                self._selectors[policy] = selected.selector
                ever.clear()
            # Without a selector nobody can say that a pod's labels do not match any more.
            left = ever & known - selected.pods if selected.selector else set()
            if left or not selected.pods <= ever:
                ever -= left
                ever |= selected.pods
                self._turns[policy] = self.turn(policy) + 1

    def selector(self, policy: PolicyUid) -> str:
        """What selects its pods, in words; with another one what was judged before says nothing."""
        return self._selectors.get(policy, "")

    def turn(self, policy: PolicyUid) -> int:
        """Another number when the policy selects other pods than before: who was refused may count from now on, and who
        counted may be refused.
        """
        return self._turns.get(policy, 0)

    def answer(self, policy: PolicyUid, cgroup: CgroupId) -> Answer:
        """Does an event of this cgroup count for this policy?"""
        selected = self.selections.get(policy)
        identity = self.identities.get(cgroup)
        if selected is None or identity is None:
            return Answer.UNKNOWN
        if not identity.inside:
            return Answer.REFUSED
        if selected.everything:
            return Answer.SELECTED
        if identity.pod == HOST:
            return Answer.REFUSED
        if identity.pod in self._ever[policy]:
            return Answer.SELECTED
        return Answer.REFUSED if identity.pod in self.known_pods else Answer.UNKNOWN

    def joint_answer(self, policies: Iterable[PolicyUid], cgroup: CgroupId) -> Answer:
        """What the filter in the kernel may say for an instance of several policies: refused only if all refuse."""
        answers = {self.answer(policy, cgroup) for policy in policies}
        if Answer.SELECTED in answers:
            return Answer.SELECTED
        if Answer.UNKNOWN in answers or not answers:
            return Answer.UNKNOWN
        return Answer.REFUSED
