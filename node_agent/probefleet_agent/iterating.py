"""Iterators and syscall programs, once an interval: what they write becomes records, or rows of a table.

The engine calls ``run`` before it reads maps, so that what these programs put into maps is there. An iterator is to the
readers a source like a map (``loaded.Loaded.source``): ``IteratorRing`` gives its lines or structs as events, and
``batches`` takes the last reading as the rows of a gauge. A reading shows what is there, not what happened since.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import iterators
from probefleet_agent.loaded import Loaded, MapHandle
from probefleet_agent.perf_ring import KeptRing


class IteratorRing(KeptRing):
    """What one iterator wrote, as records; those of one reading come together."""

    def __init__(self) -> None:
        super().__init__()
        self._fed: list[bytes] = []

    def feed(self, records: npt.NDArray[np.uint8]) -> None:
        """Take in one reading."""
        self._fed += [record.tobytes() for record in records]

    def close(self) -> None:
        """Nothing is held."""

    def _fresh(self) -> Sequence[bytes]:
        fresh, self._fed = self._fed, []
        return fresh


def run(loaded: Loaded, root: str) -> None:
    """One round of an instance: its syscall programs, then its iterators. What fails is a sentence of the report."""
    loaded.troubles.clear()
    for number, attachment in enumerate(loaded.chosen):
        kind, program = attachment.WhichOneof("target"), attachment.program
        if loaded.detached or kind not in ("interval", "iterator"):
            continue
        try:
            if kind == "interval":
                iterators.run(loaded.programs[program])
            elif link := loaded.links.get(number):
                data, whole = iterators.read(link.fd, root)
                loaded.readings[program] = data
                if not whole:
                    loaded.troubles.append(
                        f"{program} writes more than {iterators.MAX_BYTES >> 20} MiB: the rest is cut off"
                    )
        except KernelError as error:
            loaded.readings.pop(program, None)
            loaded.troubles.append(f"{program}: {error}")


def records(loaded: Loaded, source: MapHandle) -> npt.NDArray[np.uint8]:
    """The last reading as ``u1[n, record_bytes]``: structs as they were written, or lines, each cut to the field."""
    data = loaded.readings.get(source.name, b"")
    assert source.layout is not None
    size = source.layout.value_bytes
    if source.name in loaded.record_layouts:
        if len(data) % size:
            loaded.troubles.append(f"{source.name} writes {len(data)} bytes, no multiple of its record's {size}")
        return np.frombuffer(data, np.uint8)[: len(data) // size * size].reshape(-1, size)
    lines = [line[: size - 1].ljust(size, b"\0") for line in data.split(b"\n") if line]
    return np.frombuffer(b"".join(lines), np.uint8).reshape(-1, size)
