"""Which pod has which address, for programs that name the other side: pods in, what changed since a version out. Pure.

The inventory tells it of every pod that comes, changes or goes; a session asks what its node has not heard yet. A node
learns addresses and numbers only: an endpoint's number is made of the pod's uid, so that it is the same on every node
and for every operator, and names are put to it here, as they are to pod uids. Pods in their node's network share its
address, so they have none of their own.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from probefleet_wire import columns
from probefleet_wire.v1 import stream_pb2

from probefleet_core import values
from probefleet_core.program_parts import CompiledProbeMap

#: The map's room: what bpf/include/probefleet_endpoints.h says.
MAX_ENDPOINTS: Final = 65_536
#: The built-in ProbeMap: no object of Kubernetes has such a uid.
UID: Final = "endpoints"
MAP: Final = "probefleet_endpoints"
HEADER: Final = "probefleet_endpoints.h"
#: How the agent writes an endpoint's number; what follows is ``number``'s 16 digits.
MARK: Final = "endpoint:"
#: Changes that are kept: a node that has missed more is told everything anew.
MAX_CHANGES: Final = 16_384
#: Numbers of pods that have gone, so that their counts keep a name.
MAX_KNOWN: Final = 200_000


def number(pod_uid: str) -> int:
    """A pod's endpoint: 64 bits of its uid's digest, never 0."""
    return int.from_bytes(hashlib.sha256(pod_uid.encode()).digest()[:8], "little") or 1


def builtin(elf: bytes) -> CompiledProbeMap:
    """The map as a ProbeMap, from its object (bpf/agent/endpoints.bpf.c)."""
    made = values.ProbeMap(
        uid=values.ProbeMapUid(UID),
        namespace="built-in",
        name="endpoints",
        generation=1,
        deleting=False,
        type=values.MapType.HASH,
        max_entries=MAX_ENDPOINTS,
        key="ip_t address",
        value="endpoint_t pod",
    )
    return CompiledProbeMap(made, elf)


def packed(address: str) -> bytes | None:
    """16 bytes, IPv4 mapped into IPv6; None for what is no address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


@dataclass(frozen=True, slots=True)
class _Change:
    version: int
    address: bytes
    number: int  # 0: nobody has it any more


class Endpoints:
    """All addresses of all pods, with a version that grows with each change."""

    def __init__(self) -> None:
        self.version = 1
        #: Addresses that found no room.
        self.left_out = 0
        self._owners: dict[bytes, str] = {}
        self._addresses: dict[str, frozenset[bytes]] = {}
        self._changes: deque[_Change] = deque(maxlen=MAX_CHANGES)
        self._pods: OrderedDict[int, str] = OrderedDict()
        self._refused: set[tuple[str, bytes]] = set()
        #: What nodes were told at this version, by what they had heard: thousands ask for the same.
        self._answers: dict[int, stream_pb2.Endpoints] = {}
        self._answered = 0

    def __len__(self) -> int:
        return len(self._owners)

    def put(self, pod_uid: str, addresses: Iterable[str]) -> bool:
        """A pod has these addresses now (none: it has gone); whether that changed anything.

        An address that came to another pod since is that one's: the kubelet of one node may be slower than another's.
        """
        now = frozenset(each for text in addresses if (each := packed(text)))
        before = self._addresses.get(pod_uid, frozenset())
        self._refused = {each for each in self._refused if each[0] != pod_uid or each[1] in now}
        for address in before - now:
            if self._owners.get(address) == pod_uid:
                del self._owners[address]
                self._note(address, 0)
        for address in now:
            if self._owners.get(address) == pod_uid or (address in before and address in self._owners):
                continue
            if address not in self._owners and len(self._owners) >= MAX_ENDPOINTS:
                self._refused.add((pod_uid, address))
                continue
            self._refused.discard((pod_uid, address))
            self._owners[address] = pod_uid
            self._note(address, self._remember(pod_uid))
        if now:
            self._addresses[pod_uid] = now
        else:
            self._addresses.pop(pod_uid, None)
        self.left_out = len(self._refused)
        return now != before

    def pod(self, endpoint: int) -> str | None:
        """The uid of the pod that a number stands for, also of one that has gone."""
        return self._pods.get(endpoint)

    def since(self, version: int) -> stream_pb2.Endpoints:
        """What a node has to hear that knows ``version`` (0: nothing). Copy it: others are handed the same."""
        if self._answered != self.version:
            self._answers, self._answered = {}, self.version
        if version not in self._answers:
            self._answers[version] = self._since(version)
        said = self._answers[version]
        said.left_out = self.left_out
        return said

    def _since(self, version: int) -> stream_pb2.Endpoints:
        said = stream_pb2.Endpoints()
        oldest = self._changes[0].version if self._changes else self.version + 1
        if not version or version + 1 < oldest:
            said.whole = True
            there = {address: number(uid) for address, uid in self._owners.items()}
            gone: list[bytes] = []
        else:
            newest = {each.address: each.number for each in self._changes if each.version > version}
            there = {address: endpoint for address, endpoint in newest.items() if endpoint}
            gone = sorted(newest.keys() - there.keys())
        said.addresses, said.gone = b"".join(sorted(there)), b"".join(gone)
        said.numbers = columns.pack(np.array([there[address] for address in sorted(there)], np.uint64))
        return said

    def _note(self, address: bytes, endpoint: int) -> None:
        self.version += 1
        self._changes.append(_Change(self.version, address, endpoint))

    def _remember(self, pod_uid: str) -> int:
        endpoint = number(pod_uid)
        self._pods[endpoint] = pod_uid
        self._pods.move_to_end(endpoint)
        while len(self._pods) > MAX_KNOWN:
            self._pods.popitem(last=False)
        return endpoint
