"""A ProbeMap that grows: a larger map takes its place, with all entries, in all programs that use it.

The kernel cannot enlarge a map, and a program is bound to its maps when it is loaded. So::

    make the larger map, load every user's programs once more with it      nothing is touched yet
    detach the users' programs, wait until none runs any more              the gap begins
    copy the entries, attach the new programs                              the gap ends; each user reports it
    exchange all folders of pins at once, let go of the old programs and the old map

While the entries are copied no program writes, so none is lost and none counted twice. Users keep their own maps, rings
and all. The larger map goes on in the smaller one's epoch (``MapHandle.epoch``): who merges what is read sees no
change. Should anything fail before the exchange, ``installed``, which calls this, attaches the old programs again; an
agent that was killed before it does so when it starts next; one that was killed after it finds all in its new place.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from probefleet_wire import map_types
from probefleet_wire.v1 import plan_pb2

from probefleet_agent import execute, map_fit
from probefleet_agent.errors import CannotGrow, KernelError
from probefleet_agent.kernel import maps, pins, syscall
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.loaded import Loaded, MapHandle

#: What of each other type stands against it is in ``why_not``.
GROWING = frozenset({*map_types.HASHES, *map_types.ARRAYS, MapType.LPM_TRIE})
_ENTRIES_LOST: dict[int, str] = {
    MapType.RINGBUF: "its records lie where only the kernel can write",
    MapType.PERF_EVENT_ARRAY: "it has a place for each CPU, and needs no more",
    MapType.STACK_TRACE: "its stacks cannot be written back, and their ids are in other maps",
    MapType.QUEUE: "its entries can only be taken out, and would be lost with an agent that dies meanwhile",
    MapType.STACK: "its entries can only be taken out, and would be lost with an agent that dies meanwhile",
    MapType.BLOOM_FILTER: "what was put into it cannot be listed",
    MapType.PROG_ARRAY: "what its policies jump to stands in its slots",
    MapType.ARRAY_OF_MAPS: "programs hold on to its inner maps while they look into them",
    MapType.HASH_OF_MAPS: "programs hold on to its inner maps while they look into them",
}
#: Detaching takes some milliseconds before Linux 6.9.
_DETACH_SECONDS = 10.0
Entries: TypeAlias = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Grown:
    """What took the place of what; the owner closes ``before``."""

    handle: MapHandle
    users: Mapping[str, Loaded]  # by digest
    before: Sequence[Loaded]


def same(old: MapHandle, new: MapHandle) -> bool:
    """Is there nothing to do?"""
    return map_fit.same_entries(old, new) and (old.info.flags, old.info.max_entries) == (
        new.info.flags,
        new.info.max_entries,
    )


def why_not(old: MapHandle, new: MapHandle) -> str:
    """Why ``new`` cannot take the place of ``old``; empty where it can."""
    mine = map_fit.describe(old.info.type, old.info.key_size, old.info.value_size, old.layout)
    theirs = map_fit.describe(new.info.type, new.info.key_size, new.info.value_size, new.layout)
    if not map_fit.same_entries(old, new) or old.info.flags != new.info.flags:
        return f"it is {mine}, and is to become {theirs}: programs of others rely on what it is"
    if new.info.max_entries < old.info.max_entries:
        return (
            f"it has room for {old.info.max_entries:,} entries, and is to have room for {new.info.max_entries:,}: what "
            "finds no room would be lost"
        )
    if old.info.type not in GROWING:
        kind = map_types.name_of(old.info.type)
        return f"the entries of a map of type {kind} cannot be handed over: {_ENTRIES_LOST.get(old.info.type, kind)}"
    return ""


def grow(
    executor: execute.Executor,
    spec: plan_pb2.ProbeMap,
    old: MapHandle,
    new: MapHandle,
    users: Sequence[tuple[Loaded, bytes | None]],
    probe_maps: Mapping[str, MapHandle],
) -> Grown:
    """Let ``new`` take the place of ``old``. ``users``: the instances that share it, with their objects.

    Raises ProbefleetError; then nothing new is left, and users that are halted are to be resumed.
    """
    new = replace(new, heir_of=old.heir_of or old.info.id, since_ns=old.since_ns)
    title = f"ProbeMap {spec.namespace}/{spec.name}"
    step = f"{title} grew from {old.info.max_entries:,} to {new.info.max_entries:,} entries"
    with contextlib.ExitStack() as undo:
        again: dict[str, Loaded] = {}
        for loaded, blob in users:
            made = executor.load_again(loaded, blob=blob, probe_maps={**probe_maps, spec.uid: new})
            undo.callback(made.close)
            again[loaded.digest] = made
        folder = executor.root.beside_map(spec.uid)
        undo.callback(folder.remove)
        execute.pin_map(folder, spec, new)
        folders: dict[str, pins.Folder] = {}
        for digest in again:
            folders[digest] = executor.root.beside(digest)
            undo.callback(folders[digest].remove)
            executor.pin(again[digest], folders[digest])
        _halt(executor, [loaded for loaded, _ in users])
        entries = maps.read(old.fd, old.info)
        maps.update_many(new.fd, *entries)
        for loaded, _ in users:
            made = again[loaded.digest]
            executor.begin_again(made, folders[loaded.digest])
            made.add_gap(loaded.halted_ns, time.time_ns(), f"{step}: {len(entries[0]):,} were handed over")
        if late := _changed(entries, maps.read(old.fd, old.info)):
            for made in again.values():
                start_ns, end_ns, why = made.gaps[-1]
                made.gaps[-1] = (start_ns, end_ns, f"{why}; {late:,} were written later, by a program that slept")
        for digest, made in again.items():
            folders[digest].write_manifest(made.manifest())
        executor.root.exchange(list(again), [spec.uid])
        undo.pop_all()
    for loaded, _ in users:
        _keep_own(loaded, again[loaded.digest])
    return Grown(new, again, [loaded for loaded, _ in users])


def _halt(executor: execute.Executor, users: Sequence[Loaded]) -> None:
    """Detach all, and return when none of their programs runs any more."""
    ids = [number for loaded in users for number in executor.halt(loaded)]
    deadline = time.monotonic() + _DETACH_SECONDS
    while any(_attached(number) for number in ids):
        if time.monotonic() > deadline:
            raise CannotGrow(f"the kernel has not let go of the programs' links after {_DETACH_SECONDS:.0f} s")
        time.sleep(0.001)
    maps.wait_for_programs()


def _attached(link_id: int) -> bool:
    try:
        syscall.fd_by_id("link", link_id).close()
    except KernelError as error:
        # Without CAP_SYS_ADMIN nobody can ask; what is written late is found by ``_changed``.
        if error.errno in (errno.ENOENT, errno.EPERM):
            return False
        raise
    return True


def _changed(before: Entries, after: Entries) -> int:
    """How many entries of ``after`` are not in ``before`` as they are."""

    def rows(entries: Entries) -> set[bytes]:
        keys, values = entries
        return {key.tobytes() + value.tobytes() for key, value in zip(keys, values, strict=True)}

    same = len(before[0]) == len(after[0]) and all(map(np.array_equal, before, after))
    return 0 if same else len(rows(after) - rows(before))


def _keep_own(before: Loaded, after: Loaded) -> None:
    """Readers hold the descriptors of an instance's own maps: they pass on, and what was made for loading goes."""
    for name, handle in list(after.maps.items()):
        earlier = before.maps[name]
        if earlier.info.id == handle.info.id:
            handle.fd.close()
            after.maps[name] = before.maps.pop(name)
