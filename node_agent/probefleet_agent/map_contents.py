"""What a policy writes into an instance's maps: entries (``maps[].values``) and program arrays (``tailCalls``).

``execute`` writes them before the first program is attached; the engine again whenever the plan's differ from what the
instance was written with. Only what differs is touched: entries that programs made stay, and so do counts in entries
that the policy wrote once and did not change. Each entry changes at once; they go to the kernel in one batch, what is
new first, then what is gone. Where a batch fails, what was there before is written back.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Mapping

import numpy as np
from probefleet_wire import encode, map_types
from probefleet_wire.map_types import MapType
from probefleet_wire.v1 import plan_pb2

from probefleet_agent import jumping
from probefleet_agent.decode import Layout
from probefleet_agent.errors import KernelError, ObjectError, ProbefleetError
from probefleet_agent.kernel import maps, syscall
from probefleet_agent.loaded import Loaded, MapHandle

Entries = dict[bytes, bytes]


def write(
    loaded: Loaded,
    wanted: plan_pb2.Instance,
    *,
    before: plan_pb2.Instance | None = None,
    others: Iterable[Loaded] = (),
) -> None:
    """Make the maps hold what ``wanted`` says, where ``before`` (None: nothing) is what the policy wrote last.

    ``others`` may share program arrays with it. Raises ProbefleetError; then the maps hold what they held.
    """
    old = {each.map: _entries(each, loaded) for each in before.contents} if before else {}
    new = {each.map: _entries(each, loaded) for each in wanted.contents}
    initial = {name: _initial(name, before, wanted) for name in old.keys() | new.keys()}
    done: list[str] = []
    try:
        for name in sorted(initial):
            done.append(name)
            _replace(_handle(loaded, name), old.get(name, {}), new.get(name, {}), initial[name])
        _jump(loaded, _slots(before), _slots(wanted), jumping.owners_of(others))
    except ProbefleetError:
        for name in done:
            _replace(_handle(loaded, name), new.get(name, {}), old.get(name, {}), initial[name], everything=True)
        raise


def fill(loaded: Loaded) -> None:
    """Push what its queues, stacks and bloom filters hold when they are made; the first value first."""
    for content in loaded.instance.filled:
        handle = _handle(loaded, content.map)
        for value in _pushed(content, handle):
            syscall.map_push(handle.fd, value)


def _pushed(content: plan_pb2.MapContent, handle: MapHandle) -> list[bytes]:
    """The values to push; of a program that is compiled on the node as its types lay them out. Raises ObjectError."""
    if not content.given:
        size = len(content.values) // content.count
        return [content.values[at : at + size] for at in range(0, len(content.values), size)]
    kind, layout, listed = handle.info.type, handle.layout, json.loads(content.given)
    if kind not in map_types.POPPED or layout is None:
        name = map_types.name_of(kind)
        raise ObjectError(f"maps: {content.map} takes no values without a key: it is of type {name}. Write key.")
    if len(listed) > handle.info.max_entries:
        raise ObjectError(f"maps: {len(listed)} values for {content.map}, which has room for {handle.info.max_entries}")
    return [_value(layout, value, f"values[{index}] of {content.map}") for index, (_, value) in enumerate(listed)]


def _value(layout: Layout, value: object, where: str) -> bytes:
    try:
        return encode.encode(layout.value, layout.value_bytes, value, whole=False, what="value")
    except encode.EncodeError as error:
        raise ObjectError(f"maps: {where} does not fit: {error}") from error


def same(one: plan_pb2.Instance, other: plan_pb2.Instance) -> bool:
    """Is nothing to be written anew?"""
    return list(one.contents) == list(other.contents) and list(one.tail_calls) == list(other.tail_calls)


def keep(loaded: Loaded, wanted: plan_pb2.Instance) -> None:
    """Remember, in the instance, what was written."""
    instance = plan_pb2.Instance()
    instance.CopyFrom(loaded.instance)
    instance.ClearField("contents")
    instance.ClearField("tail_calls")
    instance.contents.extend(wanted.contents)
    instance.tail_calls.extend(wanted.tail_calls)
    loaded.instance = instance


def _handle(loaded: Loaded, name: str) -> MapHandle:
    handle = loaded.maps.get(name)
    if handle is None:
        raise ObjectError(f"{loaded.instance.title} has no map {name!r} to write to")
    return handle


def _entries(content: plan_pb2.MapContent, loaded: Loaded) -> Entries:
    """Key → value; of global variables place → value."""
    if content.given:
        return _laid_out(content, _handle(loaded, content.map))
    if not content.count:
        return {_place(each): each.value for each in content.variables}
    key, value = len(content.keys) // content.count, len(content.values) // content.count
    return {
        content.keys[at * key : (at + 1) * key]: content.values[at * value : (at + 1) * value]
        for at in range(content.count)
    }


def _laid_out(content: plan_pb2.MapContent, handle: MapHandle) -> Entries:
    """What a policy writes into a map whose types only the node knows. Raises ObjectError."""
    kind, layout = handle.info.type, handle.layout
    if kind not in {*map_types.HASHES, *map_types.ARRAYS, MapType.LPM_TRIE} or layout is None or not layout.key:
        raise ObjectError(
            f"maps: {content.map} takes no values: it is of type {map_types.name_of(kind)}; hashes, arrays and LPM "
            "tries of types that BCC describes do; queues and stacks do without keys"
        )
    found: Entries = {}
    for index, (key, value) in enumerate(json.loads(content.given)):
        if key is None:
            raise ObjectError(f"maps: values[{index}] of {content.map} has no key: write one")
        try:
            raw = encode.encode(layout.key, layout.key_bytes, key, whole=True, what="key")
        except encode.EncodeError as error:
            raise ObjectError(f"maps: values[{index}] of {content.map} does not fit: {error}") from error
        found[raw] = _value(layout, value, f"values[{index}] of {content.map}")
        if kind in map_types.ARRAYS and int.from_bytes(raw, "little") >= handle.info.max_entries:
            raise ObjectError(f"maps: {content.map} has no place {key}: it is an array of {handle.info.max_entries}")
    if len(found) > handle.info.max_entries:
        raise ObjectError(f"maps: {len(found)} values for {content.map}, which has room for {handle.info.max_entries}")
    return found


def _place(variable: plan_pb2.GlobalVariable) -> bytes:
    return variable.offset.to_bytes(4, "little")


def _initial(name: str, *instances: plan_pb2.Instance | None) -> Entries:
    """What global variables hold where no policy says anything."""
    contents = [each for instance in instances if instance for each in instance.contents if each.map == name]
    return {_place(each): each.initial for content in contents for each in content.variables}


def _replace(handle: MapHandle, old: Entries, new: Entries, initial: Entries, *, everything: bool = False) -> None:
    changed = {key: value for key, value in new.items() if everything or old.get(key) != value}
    gone = [key for key in old if key not in new]
    if initial:
        changed.update((key, initial[key]) for key in gone)
        maps.write_variables(handle.fd, handle.info, {int.from_bytes(key, "little"): changed[key] for key in changed})
        return
    if handle.info.type in map_types.ARRAYS:  # an array's entries cannot go: they are zero
        changed.update(dict.fromkeys(gone, bytes(handle.info.value_size)))
        gone = []
    try:
        _update(handle, changed)
    except KernelError as error:
        if error.errno not in (errno.E2BIG, errno.ENOSPC) or not gone:
            raise
        _delete(handle, gone)  # no room for old and new side by side
        gone = []
        _update(handle, changed)
    _delete(handle, gone)


def _update(handle: MapHandle, entries: Entries) -> None:
    if not entries:
        return
    keys = np.frombuffer(b"".join(entries), np.uint8).reshape(len(entries), -1)
    values = np.frombuffer(b"".join(entries.values()), np.uint8).reshape(len(entries), -1)
    if handle.info.type in map_types.PER_CPU:
        padded = np.zeros((len(entries), maps.round_up(handle.info.value_size, 8)), np.uint8)
        padded[:, : values.shape[1]] = values
        values = np.repeat(padded[:, None, :], maps.possible_cpus(), axis=1)
    maps.update_many(handle.fd, keys, values)


def _delete(handle: MapHandle, keys: list[bytes]) -> None:
    if keys:
        maps.delete_many(handle.fd, np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1))


# Program arrays.


def _slots(instance: plan_pb2.Instance | None) -> dict[tuple[str, int], str]:
    if instance is None:
        return {}
    return {(each.map, slot): name for each in instance.tail_calls for slot, name in each.entries.items()}


def _jump(
    loaded: Loaded,
    old: Mapping[tuple[str, int], str],
    new: Mapping[tuple[str, int], str],
    owners: Mapping[int, Loaded],
    *,
    undoing: bool = False,
) -> None:
    for (name, slot), program in sorted(new.items()):
        if old.get((name, slot)) == program and not undoing:
            continue
        array = _handle(loaded, name)
        try:
            jumping.require_free(array, slot, loaded, owners)
            jumping.put(loaded, array, slot, program)
        except ProbefleetError:
            if not undoing:
                _jump(loaded, new, old, owners, undoing=True)
            raise
    for name, slot in sorted(old.keys() - new.keys()):
        jumping.clear(loaded, _handle(loaded, name), slot)
