"""Which instances a process of the agent has begun to load and not ended with, because it ended in the midst of it.

libbpf and the kernel's answers are read by C code in this very process. What makes it crash would come again with the
next push, and with the one after it, and take all other policies' reports with it. So a load is noted in a pinned map
before it begins, and the note taken away when it is over; an instance that ended the process twice is not tried a third
time. Once may have been anything: a kill, a lack of memory.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator

import numpy as np

from probefleet_agent.errors import ObjectError
from probefleet_agent.kernel import maps, pins, syscall
from probefleet_agent.kernel.uapi import MapType

MAX_ENDED = 2
_KEY_BYTES, _COUNT_BYTES = 16, 8
_NAME = "attempts"
_MAX_ATTEMPTS = 1024
_NO_PREALLOC = 1  # BPF_F_NO_PREALLOC


class Attempts:
    """The pinned map: digest → how many processes have begun to load it, and not ended with it."""

    def __init__(self, root: pins.Root) -> None:
        found = root.identity_map(_NAME)
        if found is None:
            found = syscall.map_create(
                MapType.HASH, key_size=_KEY_BYTES, value_size=_COUNT_BYTES, max_entries=_MAX_ATTEMPTS,
                name="pf_attempts", flags=_NO_PREALLOC,
            )  # fmt: skip
            root.pin_identity(_NAME, found)
        self._map = found

    @contextlib.contextmanager
    def noted(self, digest: str) -> Iterator[None]:
        """Load within. ObjectError where earlier processes ended there, and no other did."""
        key = _key(digest)
        before = int.from_bytes(syscall.map_lookup(self._map, key, _COUNT_BYTES) or b"", "little")
        if before >= MAX_ENDED:
            raise ObjectError(
                f"the agent's process ended {before} times while it loaded this program, so it is not tried again. "
                "Change the policy's program, and report it: what crashes its loader is a flaw in the loader"
            )
        syscall.map_update(self._map, key, (before + 1).to_bytes(_COUNT_BYTES, "little"))
        try:
            yield
        finally:
            syscall.map_delete(self._map, key)

    def keep_only(self, digests: Collection[str]) -> None:
        """Forget instances that nobody wants any more."""
        kept = {_key(digest) for digest in digests}
        keys, _ = maps.read(self._map, maps.info(self._map))
        for key in (np.asarray(row).tobytes() for row in keys):
            if key not in kept:
                syscall.map_delete(self._map, key)

    def close(self) -> None:
        """Let go of the descriptor; the pin stays."""
        self._map.close()


def _key(digest: str) -> bytes:
    return hashlib.blake2b(digest.encode(), digest_size=_KEY_BYTES).digest()
