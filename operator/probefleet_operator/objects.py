"""ProbePolicies and ProbeMaps as last seen, and whether all of them are known. Pure but for its callers' clock.

kopf's events flow in and so do lists of our own (handlers.py). kopf tells "listed" from "watched" (`type`
None) but not when a list has ended, and it says nothing of objects that vanished between two of its lists; so the
whole list, made by ourselves, is what completeness and absence are read from. In whatever order the two arrive, the
newest resourceVersion of an object wins and a uid that is gone never comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

from probefleet_operator import api

Kind = Literal["ProbePolicy", "ProbeMap"]
PLURAL: dict[Kind, str] = {"ProbePolicy": "probepolicies", "ProbeMap": "probemaps"}
MAX_GONE = 10_000


class ObjectStore:
    """Both kinds, by uid. Raw objects are never changed by anybody."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[str, api.Json]] = {"ProbePolicy": {}, "ProbeMap": {}}
        self._complete: set[Kind] = set()
        self._gone: OrderedDict[str, None] = OrderedDict()

    @property
    def complete(self) -> bool:
        """Both kinds have been listed to the end."""
        return len(self._complete) == len(PLURAL)

    def all(self, kind: Kind) -> dict[str, api.Json]:
        """The objects of one kind by uid; not to be changed."""
        return self._objects[kind]

    def observe(self, kind: Kind, raw: api.Json, *, gone: bool) -> bool:
        """One object was seen; True where that changed what is asked for (a status that we wrote comes back as well).

        An object under deletion counts as deleted: the user said so, and what keeps it is somebody else's finalizer.
        """
        metadata = raw["metadata"]
        uid = metadata["uid"]
        if gone or metadata.get("deletionTimestamp"):
            return self._remove(kind, uid)
        if uid in self._gone:
            return False
        known = self._objects[kind].get(uid)
        if known is not None and _version(known) >= _version(raw):
            return False
        self._objects[kind][uid] = raw
        return known is None or known["metadata"].get("generation") != metadata.get("generation")

    def relisted(self, kind: Kind, uids: Iterable[str], *, known_before: Iterable[str]) -> bool:
        """A whole list, begun when `known_before` were known, has exactly `uids`; True where something was removed."""
        present = set(uids)
        removed = [uid for uid in known_before if uid not in present]
        self._complete.add(kind)
        # Not any(): each of them has to go.
        return sum(self._remove(kind, uid) for uid in removed) > 0

    def _remove(self, kind: Kind, uid: str) -> bool:
        self._gone[uid] = None
        while len(self._gone) > MAX_GONE:
            self._gone.popitem(last=False)
        return self._objects[kind].pop(uid, None) is not None


def _version(raw: api.Json) -> int:
    """resourceVersion as a number: comparable by contract since Kubernetes 1.35, and with etcd ever since."""
    try:
        return int(raw["metadata"]["resourceVersion"])
    except (KeyError, ValueError):
        return 0
