"""Keys of one output, numbered: rows of nodes in, group numbers and labels out.

``tables`` interns the keys of new rows here (the only loop over rows, once a key), so that from then on a row
is a number and merging is NumPy. ``group`` puts names to identities and finds which keys are one row of the
report. Key 0 stands for all that no longer found room: a node that invents keys cannot fill the memory. Of nodes that
have left for good, the keys that are one row of the report become one (``fold``), so that those to come find room.

A node is believed only about its own pods: a key with a pod's uid also says (after its columns) which node sent it,
and where that pod is known to be on another one the row is nobody's. What the node sent is counted, under no name.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from probefleet_wire import columns
from probefleet_wire.v1 import stream_pb2

from probefleet_core import result
from probefleet_core.result import Label, Labels, Names

OTHER_KEY: Final = 0
#: Keys of one output, all nodes together, and from one node: 5,000 nodes with 30 pods each are 150,000.
MAX_KEYS: Final = 200_000
MAX_NODE_KEYS: Final = 50_000
#: Stacks are long; 128 MiB hold 60,000 of 2 KB.
MAX_KEY_BYTES: Final = 128 << 20
MAX_NODE_KEY_BYTES: Final = 32 << 20

NODE: Final = "node"
POD_UID: Final = "pod_uid"
#: How agents write the number of an endpoint (``endpoints.MARK``).
ENDPOINT: Final = "endpoint:"
_POD_COLUMNS: Final = ("namespace", "workload", "pod")
#: The wire's columns of each identity in groupBy.
_WIRE: Final = {
    **dict.fromkeys(_POD_COLUMNS, ("pod_uid",)),
    "container": ("pod_uid", "container_id"),
    NODE: (NODE,),
}
_IDENTITY_COLUMNS: Final = ("pod_uid", "container_id")


def wire_columns(group_by: Iterable[str]) -> tuple[str, ...]:
    """The columns that make a key, in order: fields as they are, identities as the wire has them, and the node."""
    names = (column for group in group_by for column in _WIRE.get(group, (group,)))
    return tuple(dict.fromkeys(names))


@dataclass(slots=True)
class Keys:
    """The keys of one output. ``names`` are the wire's columns."""

    group_by: tuple[str, ...]
    names: tuple[str, ...] = ()
    overflowed: bool = False
    limit: int = MAX_KEYS  # less where a key has many values
    _ids: dict[Labels, int] = field(default_factory=dict)
    _keys: list[Labels] = field(default_factory=list)
    _bytes: int = 0
    #: How many keys and bytes came first from a node.
    _of_node: dict[str, tuple[int, int]] = field(default_factory=dict)
    _rows: dict[Labels, int] = field(default_factory=dict)
    _row_of: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _new: list[int] = field(default_factory=list)  # that `group` has not looked at
    _unresolved: list[int] = field(default_factory=list)
    #: The keys that only this node speaks of, because they say which node sent them; not where each row is a node's.
    _own: dict[str, array[int]] = field(default_factory=dict)
    _heirs: dict[int, int] = field(default_factory=dict)  # row → the key that stands for those of departed nodes
    _free: list[int] = field(default_factory=list)  # numbers without a key
    #: Node → how many of its keys are of pods that are on another one.
    foreign: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = wire_columns(self.group_by)
        self._keys.append(tuple(result.OTHER for _ in self.names))

    def __len__(self) -> int:
        return len(self._keys)

    def intern(self, node: str, table: stream_pb2.Table) -> npt.NDArray[np.int64]:
        """The number of each new row's key. Raises ColumnsError, before anything is changed."""
        count = table.new_rows
        if not count:
            return np.zeros(0, np.int64)
        sent = {column.name: column for column in table.keys}
        parts: list[Sequence[Label]] = []
        for name in self.names:
            if name == NODE:
                parts.append([node] * count)
            elif name in sent:
                content = columns.read_column(sent[name], count)
                parts.append(content if isinstance(content, list) else content.tolist())
            elif name in _IDENTITY_COLUMNS:
                # A map without a cgroup in its key: nobody knows whose it is.
                parts.append(["?"] * count)
            else:
                raise columns.ColumnsError(f"new rows of output {table.output[:64]!r} without column {name!r}")
        if table.other_row:
            other = table.other_row - 1 - table.first_new_row
            if not 0 <= other < count:
                raise columns.ColumnsError(f"output {table.output[:64]!r}: row {other} of {count} new ones is (other)")
            # All that found no room on the node, under one name whatever the columns' types are.
            parts = [
                part if name == NODE else [*part[:other], result.OTHER, *part[other + 1 :]]
                for name, part in zip(self.names, parts, strict=True)
            ]
        if POD_UID in self.names:
            uids = parts[self.names.index(POD_UID)]
            parts.append(["" if uid in _SPECIAL else node for uid in uids])
        if not parts:
            rows: Iterable[Labels] = [()] * count
        else:
            rows = zip(*parts, strict=True)
        ids = self._ids
        return np.fromiter((ids.get(key) or self._add(node, key) for key in rows), np.int64, count)

    def fold(self, node: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The node has left for good: the keys that are free from now on, and for each the one that has its counts.

        What has no final name yet keeps its key.
        """
        self._of_node.pop(node, None)
        unnamed = {*self._new, *self._unresolved}
        named = [number for number in self._own.pop(node, ()) if number not in unnamed]
        heirs = [self._heirs.setdefault(int(self._row_of[number]), number) for number in named]
        gone = [(number, heir) for number, heir in zip(named, heirs, strict=True) if number != heir]
        for number, _ in gone:
            key = self._keys[number]
            del self._ids[key]
            self._bytes -= _size(key)
            self._keys[number], self._row_of[number] = (), 0
            self._free.append(number)
        pairs = np.array(gone, np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _add(self, node: str, key: Labels) -> int:
        key_bytes = _size(key)
        node_keys, node_bytes = self._of_node.get(node, (0, 0))
        if (
            (len(self._keys) > self.limit and not self._free)
            or self._bytes + key_bytes > MAX_KEY_BYTES
            or node_keys >= MAX_NODE_KEYS
            or node_bytes + key_bytes > MAX_NODE_KEY_BYTES
        ):
            self.overflowed = True
            return OTHER_KEY
        self._of_node[node] = (node_keys + 1, node_bytes + key_bytes)
        self._bytes += key_bytes
        if self._free:
            number = self._free.pop()
            self._keys[number] = key
        else:
            number = len(self._keys)
            self._keys.append(key)
        self._ids[key] = number
        self._new.append(number)
        if NODE not in self.names and POD_UID in self.names and key[-1] == node:
            self._own.setdefault(node, array("q")).append(number)
        return number

    def group(self, names: Names, *, qualified: bool) -> tuple[npt.NDArray[np.int64], list[Labels]]:
        """Which row of the report each key belongs to, and the rows' labels; row 0 is that of key 0.

        ``qualified``: pods of many namespaces come together, so a pod's label is ``namespace/name``. What a
        key is called is remembered; only new keys, and those whose pod nobody knew, are looked at. Labels
        that no key has any more (a uid that has a name by now) stay in the list for a while, with no key.
        """
        joiner = Joiner(names, qualified=qualified and "namespace" not in self.group_by)
        joins = [
            (joiner.label(group), tuple(self.names.index(column) for column in _WIRE.get(group, (group,))))
            for group in self.group_by
        ]
        rows, says_who = self._rows, POD_UID in self.names
        self._row_of = np.concatenate([self._row_of, np.zeros(len(self._keys) - len(self._row_of), np.int64)])
        unresolved = []
        for number in (*self._unresolved, *self._new):
            key = self._keys[number]
            joiner.resolved, joiner.foreign = True, False
            joiner.node = str(key[-1]) if says_who else ""
            label = tuple(join(*(key[place] for place in places)) for join, places in joins)
            self._row_of[number] = rows.setdefault(label, len(rows) + 1)
            if not joiner.resolved:
                unresolved.append(number)
            elif joiner.foreign:
                self.foreign[joiner.node] = self.foreign.get(joiner.node, 0) + 1
        self._unresolved, self._new = unresolved, []
        if len(rows) > 2 * len(self._keys):
            self._forget_labels()
        return self._row_of, [tuple(result.OTHER for _ in self.group_by), *self._rows]

    def _forget_labels(self) -> None:
        """Those that no key has any more go, and the others' rows are numbered anew, in order."""
        used = np.unique(np.append(self._row_of, 0))
        place = np.zeros(len(self._rows) + 1, np.int64)
        place[used] = np.arange(len(used))
        labels = list(self._rows)
        self._rows = {labels[row - 1]: number for number, row in enumerate(used.tolist()) if row}
        self._row_of = place[self._row_of]
        self._heirs = {int(place[row]): key for row, key in self._heirs.items()}


def _size(key: Labels) -> int:
    return sum(len(part) for part in key if isinstance(part, str)) + 64


class Joiner:
    """Puts names to pod uids and container ids, each asked for once; ``node`` is whose word it is."""

    __slots__ = ("_names", "_pods", "_qualified", "foreign", "node", "resolved")

    def __init__(self, names: Names, *, qualified: bool) -> None:
        self._names = names
        self._qualified = qualified
        self._pods: dict[Label, result.PodName | None] = {}
        self.resolved = True  # set to False by a label for which a name was missing
        self.node = ""
        self.foreign = False  # set to True by a label of a pod that is on another node

    def label(self, group: str) -> Callable[..., Label]:
        """The function that makes one label of ``groupBy`` of a key's columns."""
        joins: dict[str, Callable[..., Label]] = {
            "namespace": self._namespace,
            "workload": self._workload,
            "pod": self._pod,
            "container": self._container,
        }
        return joins.get(group, self._field)

    def _field(self, part: Label) -> Label:
        """A program's own field: as it is, but the pod that an endpoint stands for by its name, wherever it runs."""
        if not isinstance(part, str) or not part.startswith(ENDPOINT):
            return part
        pod = self._find(part)
        return f"{pod.namespace}/{pod.name}" if pod else part

    def _find(self, uid: Label) -> result.PodName | None:
        """The pod's names; None for the host, the unknown, and pods that nobody has heard of."""
        if uid not in self._pods:
            self._pods[uid] = None if uid in _SPECIAL else self._names(str(uid))
        pod = self._pods[uid]
        if pod is None and uid not in _SPECIAL:
            self.resolved = False
        return pod

    def _elsewhere(self, pod: result.PodName) -> bool:
        """Whether the node speaks for a pod that is not its own."""
        elsewhere = bool(pod.nodes and self.node) and self.node not in pod.nodes
        self.foreign = self.foreign or elsewhere
        return elsewhere

    def _namespace(self, uid: Label) -> Label:
        pod = self._find(uid)
        if not pod:
            return _SPECIAL.get(uid, result.UNKNOWN)
        return result.UNKNOWN if self._elsewhere(pod) else pod.namespace

    def _workload(self, uid: Label) -> Label:
        pod = self._find(uid)
        if not pod:
            return _SPECIAL.get(uid, result.UNKNOWN)
        return result.UNKNOWN if self._elsewhere(pod) else self._with_namespace(pod, pod.workload or pod.name)

    def _pod(self, uid: Label) -> Label:
        pod = self._find(uid)
        if not pod:
            # The uid of a pod that came and went unseen is worth more than "unknown": kubelet's logs have it.
            return _SPECIAL.get(uid, uid)
        return result.UNKNOWN if self._elsewhere(pod) else self._with_namespace(pod, pod.name)

    def _container(self, uid: Label, container_id: Label) -> Label:
        pod = self._find(uid)
        if not pod:
            return _SPECIAL.get(uid, str(container_id)[:12] or result.UNKNOWN)
        if not container_id or self._elsewhere(pod):
            return result.UNKNOWN
        name = pod.containers.get(str(container_id))
        if name is None:
            self.resolved = False
        return name or str(container_id)[:12]

    def _with_namespace(self, pod: result.PodName, name: str) -> str:
        return f"{pod.namespace}/{name}" if self._qualified else name


_SPECIAL: Final[dict[Label, str]] = {"": result.HOST, "?": result.UNKNOWN, result.OTHER: result.OTHER}
