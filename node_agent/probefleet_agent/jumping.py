"""Program arrays that instances share (ProbeMaps): whose program stands in which slot.

A slot holds its program for as long as the array is pinned, whatever became of the instance that put it there. So::

    enter    before an instance is attached: its slots, unless another policy's program stands there
    leave    when it is detached, halted or removed, or could not be loaded: those slots that hold its own programs
    settle   when an agent starts: programs of nobody that is here go from the slots

An instance that takes the place of another of the same policy takes over its slots; the jump through a slot sees the
one or the other. Other policies see an empty slot while an instance is halted, and their jumps go on behind the call.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping

from probefleet_wire.map_types import MapType

from probefleet_agent.errors import KernelError, ObjectError, SlotTaken
from probefleet_agent.kernel import syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.loaded import Loaded, MapHandle


def enter(loaded: Loaded, others: Iterable[Loaded]) -> None:
    """Put its programs into the slots that it names. Raises SlotTaken, ObjectError: ``leave`` then."""
    owners = owners_of(others)
    for array, slot, name in _wanted(loaded):
        require_free(array, slot, loaded, owners)
        put(loaded, array, slot, name)


def leave(loaded: Loaded, others: Iterable[Loaded]) -> None:
    """Take its programs out of the slots; of those that another instance of its policy names, for that one's."""
    own, heirs = set(owners_of([loaded])), _heirs(each for each in others if each is not loaded)
    for array, slot, _ in _wanted(loaded):
        if _held(array, slot) in own:
            _pass_on(array, slot, heirs)


def settle(arrays: Iterable[MapHandle], instances: Iterable[Loaded]) -> None:
    """In slots of programs that none of these instances has: the program of the one that names the slot, or none."""
    instances = list(instances)
    owners, heirs = owners_of(instances), _heirs(instances)
    for array in arrays:
        if array.info.type == MapType.PROG_ARRAY:
            for slot in range(array.info.max_entries):
                held = _held(array, slot)
                if held not in owners and (held or (array.info.id, slot) in heirs):
                    _pass_on(array, slot, heirs)


def owners_of(instances: Iterable[Loaded]) -> dict[int, Loaded]:
    """Whose each program is, by its id in the kernel."""
    return {syscall.program_info(fd).id: loaded for loaded in instances for fd in loaded.programs.values()}


def require_free(array: MapHandle, slot: int, loaded: Loaded, owners: Mapping[int, Loaded]) -> None:
    """Raise SlotTaken where another policy's program stands in the slot of a shared array."""
    other = owners.get(_held(array, slot)) if array.probe_map_uid else None
    if other is None or other.instance.owner == loaded.instance.owner:
        return
    raise SlotTaken(
        f"{loaded.instance.title}: slot {slot} of {array.name} holds a program of {other.instance.title}, which shares "
        "the ProbeMap. Write another slot, or take it out of that policy's tailCalls."
    )


def put(loaded: Loaded, array: MapHandle, slot: int, name: str) -> None:
    """Let the slot jump to one of its programs. Raises ObjectError where the kernel does not."""
    program = loaded.programs.get(name)
    if program is None:
        raise ObjectError(f"{loaded.instance.title}: slot {slot} of {array.name}: program {name!r} is not loaded")
    try:
        _set(array, slot, program)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ObjectError(
            f"{loaded.instance.title}: slot {slot} of {array.name}: the kernel takes no jump to {name} "
            f'(SEC("{loaded.sections.get(name, "")}")), for it is a program of another type than those that jump. '
            "Give it the same SEC() as these."
        ) from error


def clear(loaded: Loaded, array: MapHandle, slot: int) -> None:
    """Jumps through the slot go on behind the call, where the slot is the instance's."""
    if not array.probe_map_uid or _held(array, slot) in owners_of([loaded]):
        _delete(array, slot)


def _heirs(instances: Iterable[Loaded]) -> dict[tuple[int, int], Fd]:
    """(map id, slot) → the program that an attached instance names for it."""
    return {
        (array.info.id, slot): loaded.programs[name]
        for loaded in instances
        if not loaded.detached and not loaded.halted_ns
        for array, slot, name in _wanted(loaded)
        if name in loaded.programs
    }


def _pass_on(array: MapHandle, slot: int, heirs: Mapping[tuple[int, int], Fd]) -> None:
    if heir := heirs.get((array.info.id, slot)):
        _set(array, slot, heir)
    else:
        _delete(array, slot)


def _wanted(loaded: Loaded) -> Iterator[tuple[MapHandle, int, str]]:
    """(shared array, slot, program) that the instance names."""
    for each in loaded.instance.tail_calls:
        array = loaded.maps.get(each.map)
        if array is not None and array.probe_map_uid:
            yield from ((array, slot, name) for slot, name in sorted(each.entries.items()))


def _held(array: MapHandle, slot: int) -> int:
    """The kernel's id of the program in a slot; 0: it is empty."""
    return int.from_bytes(syscall.map_lookup(array.fd, slot.to_bytes(4, "little"), 4) or b"", "little")


def _delete(array: MapHandle, slot: int) -> None:
    syscall.map_delete(array.fd, slot.to_bytes(4, "little"))


def _set(array: MapHandle, slot: int, program: Fd) -> None:
    syscall.map_update(array.fd, slot.to_bytes(4, "little"), int(program).to_bytes(4, "little"))
