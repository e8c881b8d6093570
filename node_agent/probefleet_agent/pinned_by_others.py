"""Maps that somebody else pinned (tc, Cilium, bpftool): read by our programs and outputs, never written to.

``execute`` opens them read-only. That binds our descriptor, not our programs, so these are proved: they are loaded once
with a stand-in, an empty map of the same type that programs may only read (BPF_F_RDONLY_PROG). What the verifier lets
pass then does not write, and is loaded again with the real map.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

from probefleet_wire import map_types
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.map_types import Flag, MapType
from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import KernelError, NotObserving, ObjectError, UnsupportedFeature, VerifierError
from probefleet_agent.kernel import libbpf, maps, syscall
from probefleet_agent.loaded import MapHandle

#: Instead of a ProbeMap's uid: the map is not ours.
MARK = "pinned:"
#: Types of which programs can be kept from writing.
_PROVABLE = frozenset(
    {*map_types.HASHES, *map_types.ARRAYS, MapType.LPM_TRIE, MapType.QUEUE, MapType.STACK, MapType.BLOOM_FILTER}
)
_STAND_IN_ENTRIES = 64
_WRITES = ("write into map forbidden", "write access to map")


@contextlib.contextmanager
def opened(instance: plan_pb2.Instance) -> Iterator[dict[str, MapHandle]]:
    """The maps that the instance names, by their names in the program. Raises what a person can act on."""
    with contextlib.ExitStack() as held:
        found = {}
        for each in instance.pinned_maps:
            try:
                fd = held.enter_context(syscall.obj_get(each.path, read_only=True))
            except KernelError as error:
                advice = "Nothing is pinned there on this node." if error.errno == errno.ENOENT else error.advice
                raise KernelError(
                    error.errno, f"{instance.title}: open map {each.map} at {each.path}", advice
                ) from None
            try:
                info = maps.info(fd)
            except KernelError as error:
                raise ObjectError(f"{instance.title}: {each.path} is pinned, but it is no map") from error
            found[each.map] = MapHandle(each.map, fd, info, None, f"{MARK}{each.path}")
        yield found


def prove_read_only(
    blob: bytes, instance: plan_pb2.Instance, parsed: BpfObject, foreign: dict[str, MapHandle],
    configure: Callable[[libbpf.Object], None],
) -> None:  # fmt: skip
    """Raise NotObserving where a program could write to one of these maps. ``configure`` prepares the object."""
    used = {name: handle for name, handle in foreign.items() if parsed.callers(name)}
    if not used:
        return
    for name, handle in used.items():
        if handle.info.type not in _PROVABLE:
            kind = map_types.name_of(handle.info.type)
            raise UnsupportedFeature(
                f"way to keep programs from writing to {name}", why=f"it is of type {kind}; only outputs can read it"
            )
    with libbpf.open_object(blob, instance.title) as trial:
        configure(trial)
        for name, handle in used.items():
            trial.add_flags(name, handle.info.flags & ~Flag.WRONLY_PROG | Flag.RDONLY_PROG)
            entries = handle.info.max_entries
            trial.set_max_entries(
                name, entries if handle.info.type in map_types.ARRAYS else min(entries, _STAND_IN_ENTRIES)
            )
        try:
            trial.load()
        except VerifierError as error:
            if not any(words in error.log for words in _WRITES):
                raise
            where = ", ".join(f"{name} ({handle.probe_map_uid.removeprefix(MARK)})" for name, handle in used.items())
            raise NotObserving.because(
                instance.title, f"it could write to a map that others own: {where}; {error.summary}"
            ) from error
