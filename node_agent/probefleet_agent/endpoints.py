"""The built-in shared map ``endpoints``: address → the number of the pod that has it, as the operator says.

It is a ProbeMap like any other (made, shared, pinned and adopted so), whose entries come with the pushes: all of them
first, then what changed. The engine hands each push on.
"""

from __future__ import annotations

import numpy as np
from probefleet_wire import columns
from probefleet_wire.v1 import stream_pb2

from probefleet_agent.errors import ProbefleetError
from probefleet_agent.kernel import maps
from probefleet_agent.loaded import MapHandle

UID = "endpoints"
ADDRESS_BYTES = 16
MAX_ENDPOINTS = 65_536


class Endpoints:
    """What the operator has said, and what of it stands in the map."""

    def __init__(self) -> None:
        self.left_out = 0
        self.failure = ""  # why the map does not hold what was said
        self._said: dict[bytes, int] | None = None  # None: nothing yet in this process
        self._written: dict[bytes, int] | None = None  # None: not looked at yet
        self._map_id = 0

    def hear(self, said: stream_pb2.Endpoints) -> None:
        """Take in a push's. ValueError (ColumnsError) for what cannot be."""
        addresses, gone = _split(said.addresses), _split(said.gone)
        numbers = columns.unpack(said.numbers, limit=MAX_ENDPOINTS).tolist()
        if len(numbers) != len(addresses):
            raise columns.ColumnsError(f"{len(addresses)} addresses of endpoints with {len(numbers)} numbers")
        before = {} if said.whole else self._said
        if before is None:
            raise columns.ColumnsError("a change of endpoints came before all of them")
        after = dict(before)
        for address in gone:
            after.pop(address, None)
        after.update(zip(addresses, (int(each) for each in numbers), strict=True))
        if len(after) > MAX_ENDPOINTS:
            raise columns.ColumnsError(f"{len(after)} endpoints; at most {MAX_ENDPOINTS} are taken")
        self._said, self.left_out = after, said.left_out

    def write(self, handle: MapHandle | None) -> None:
        """Make the map hold what was said; what fails is tried again with the next push."""
        if handle is None or self._said is None:
            return
        if handle.info.id != self._map_id or self._written is None:
            # Whatever an earlier process wrote.
            keys, values = maps.read(handle.fd, handle.info)
            held = values.view("<u8").reshape(-1).tolist()
            self._written = {bytes(key): number for key, number in zip(keys, held, strict=True)}
            self._map_id = handle.info.id
        gone = [address for address in self._written if address not in self._said]
        fresh = {address: number for address, number in self._said.items() if self._written.get(address) != number}
        try:
            if gone:
                maps.delete_many(handle.fd, np.frombuffer(b"".join(gone), np.uint8).reshape(-1, ADDRESS_BYTES))
            if fresh:
                keys = np.frombuffer(b"".join(fresh), np.uint8).reshape(-1, ADDRESS_BYTES)
                maps.update_many(handle.fd, keys, np.array(list(fresh.values()), "<u8").view(np.uint8).reshape(-1, 8))
        except ProbefleetError as error:
            self.failure, self._written = str(error), None
            return
        self.failure, self._written = "", self._said  # which ``hear`` replaces, and does not change

    def sentences(self) -> list[str]:
        """What its users' reports have to say."""
        if self._written is None:
            why = self.failure or "no operator has said yet which pod has which address"
            return [f"endpoints is not filled: {why}"]
        if self.left_out:
            return [f"endpoints is full: {self.left_out:,} addresses of pods are not in it, and seem to be of no pod"]
        return []


def _split(data: bytes) -> list[bytes]:
    if len(data) % ADDRESS_BYTES:
        raise columns.ColumnsError(f"addresses of endpoints have {ADDRESS_BYTES} bytes each, not {len(data)} together")
    return [data[at : at + ADDRESS_BYTES] for at in range(0, len(data), ADDRESS_BYTES)]
