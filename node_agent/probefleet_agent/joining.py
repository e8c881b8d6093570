"""A policy comes to a program that runs already for another: its totals begin when it came, and not with the program.

::

    engine binds ─▶ join: read the maps once ─▶ baseline ─▶ pinned array ─▶ manifest names the policy ─▶ first batch
    adoption     ─▶ adopt: the same baseline, so nothing is lost or doubled by ``kill -9``
    each reading ─▶ collect subtracts ─▶ keep: which keys went, before the batch that says so is sent
    unbinding    ─▶ manifest without the policy ─▶ leave: the array goes

What the instance lost before is not the policy's either. Of rings there is no baseline: its records begin at a mark.
Maps that are somebody else's (ProbeMaps, pinned by others) have a life of their own: of them a policy shows what they
hold, whoever counted it. Where no baseline can be taken, the tables are the instance's, and the report says so.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import structlog
from probefleet_wire.v1 import plan_pb2

from probefleet_agent import baseline, decode
from probefleet_agent.baseline import Baseline, Nature
from probefleet_agent.decode import DecodeError, Layout
from probefleet_agent.errors import ProbefleetError
from probefleet_agent.kernel import blobs, maps, pins, uapi
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.loaded import ITERATOR, Joined, Loaded, MapHandle

#: All baselines of one instance together, in the agent's memory.
MAX_INSTANCE_BYTES = 64 << 20
_CUMULATIVE = frozenset(
    {plan_pb2.Output.COUNTER, plan_pb2.Output.HISTOGRAM, plan_pb2.Output.TOPK, plan_pb2.Output.STACKS}
)

log = structlog.get_logger("agent")


class TooLarge(ProbefleetError):
    """A baseline that there is no room for."""


def join(root: pins.Root, loaded: Loaded, plan: plan_pb2.Plan) -> None:
    """Before the policy is bound, and named in the manifest: its counts begin now."""
    if loaded.running is not None:
        # A second or two: what it has not said yet was counted before, too.
        loaded.running.ask()
        loaded.running.pump(complete=True)
    joined = Joined(0, loaded.lost(), loaded.runs().recursion_misses)
    loaded.joined[plan.policy_uid] = joined
    _begin(root, loaded, plan, joined)
    joined.since_ns = time.time_ns()
    log.info(
        "a policy joins a running program", digest=loaded.digest, policy=plan.policy_uid, said=joined.said,
        keys=sum(len(each.keys) for each in joined.baselines.values()),
    )  # fmt: skip


def extend(root: pins.Root, loaded: Loaded, plan: plan_pb2.Plan) -> None:
    """The plan of a policy that joined has changed: what its outputs read now, and did not before, begins now."""
    joined = loaded.joined.get(plan.policy_uid)
    if joined is not None:
        _begin(root, loaded, plan, joined)


def adopt(root: pins.Root, loaded: Loaded, told: Mapping[str, Any]) -> bool:
    """Take over what an earlier process kept, as its manifest has it; whether the manifest is to be written anew."""
    folder, anew = root.folder(loaded.digest), False
    loaded.joined = {uid: _of_manifest(each) for uid, each in told.items() if uid in loaded.plans}
    for uid, joined in list(loaded.joined.items()):
        if not told[uid]["kept"]:
            continue
        try:
            joined.kept = folder.open_baseline(uid)
            joined.baselines = {(one.map, one.value): one for one in baseline.unpack(blobs.read(joined.kept))}
        except (ProbefleetError, ValueError) as error:
            log.warning("a baseline cannot be read: its policy begins anew", policy=uid, error=str(error))
            joined.close()
            join(root, loaded, loaded.plans[uid])
            loaded.joined[uid].said = "the agent could not read what this policy had counted: it began anew"
            anew = True
    for uid in folder.list_baselines():
        if uid not in loaded.joined:
            folder.unpin_baseline(uid)
    return anew


def begun_again(loaded: Loaded, told: Mapping[str, Any]) -> None:
    """Of an instance whose maps are new: all that they count came after its policies."""
    for uid, each in told.items():
        joined = Joined(each["since_ns"])
        for (name, value), handle in _sources(loaded, loaded.plans[uid]).items():
            nothing = np.zeros((0, handle.info.key_size), np.uint8)
            joined.baselines[name, value] = baseline.take(
                map_name=name, value=value, map_id=handle.info.id, since_ns=joined.since_ns,
                nature=Nature(False, False), keys=nothing, numbers=np.zeros(0, np.uint64),
            )  # fmt: skip
        loaded.joined[uid] = joined


def passed_on(loaded: Loaded) -> dict[str, Joined]:
    """To the same maps with their programs loaded anew, which have skipped no run yet."""
    return {
        policy: dataclasses.replace(joined, misses=0, kept=joined.kept.dup() if joined.kept is not None else None)
        for policy, joined in loaded.joined.items()
    }


def keep(loaded: Loaded, policy: str) -> None:
    """Keys that were found gone in this reading stay so, whoever reads next."""
    joined = loaded.joined.get(policy)
    if joined is None or not any(each.changed for each in joined.baselines.values()):
        return
    if joined.kept is not None:
        blobs.patch(joined.kept, baseline.GONE_AT, baseline.gone_bits(joined.baselines.values()))
    for each in joined.baselines.values():
        each.changed = False


def leave(root: pins.Root, loaded: Loaded, policy: str, joined: Joined) -> None:
    """The policy is no longer in the manifest: its array goes."""
    joined.close()
    root.folder(loaded.digest).unpin_baseline(policy)


def sentences(joined: Joined | None, one: Baseline | None) -> list[str]:
    """What a table has to say of where its counts begin."""
    words = [joined.said] if joined is not None and joined.said else []
    if one is not None and (gone := int(one.gone.sum())):
        words.append(
            f"{gone:,} keys of {one.map} that were there before this policy went, or began anew: counts between its "
            "last reading and that are missing"
        )
    return words


def _begin(root: pins.Root, loaded: Loaded, plan: plan_pb2.Plan, joined: Joined) -> None:
    """Take the baselines that are not there yet, and pin all of them. Where that cannot be, the report will say so."""
    sources = _sources(loaded, plan)
    missing = {key: sources[key] for key in sources.keys() - joined.baselines.keys() - joined.whole}
    earlier, made = dict(joined.baselines), None
    try:
        for key, handle in missing.items():
            taken = _take(handle, key[1])
            if taken is not None:
                joined.baselines[key] = taken
        if len(joined.baselines) == len(earlier):
            return
        _check_room(loaded)
        data = baseline.pack(list(joined.baselines.values()))
        budget, used = plan.budget.map_memory_bytes, loaded.map_bytes
        if budget and used + len(data) > budget:
            raise TooLarge(f"{len(data):,} bytes more are beyond budget.mapMemory ({used:,} of {budget:,} are taken)")
        made = blobs.create(data, "pf_baseline")
        root.folder(loaded.digest).pin_baseline(plan.policy_uid, made)
    except (ProbefleetError, OSError) as error:
        if made is not None:
            made.close()
        joined.baselines = earlier
        joined.whole |= set(missing)
        joined.said = f"in part of the time before this policy came, since the program began: {error}"
        return
    joined.close()
    joined.kept = made


def _sources(loaded: Loaded, plan: plan_pb2.Plan) -> dict[tuple[str, str], MapHandle]:
    """Map and field of each output that adds up, where the map is the instance's own."""
    found: dict[tuple[str, str], MapHandle] = {}
    for output in plan.outputs:
        handle = loaded.source(output.map) if output.kind in _CUMULATIVE else None
        # An iterator's records are read anew each time.
        if handle is not None and handle.layout and not handle.probe_map_uid and handle.info.type != ITERATOR:
            found[output.map, output.value] = handle
    return found


def nature_of(handle: MapHandle, layout: Layout, value: str) -> Nature:
    """How the entries of a map come and go. Raises DecodeError where the value has no such field."""
    counter, kind = decode.find(layout.value, value, "the map's value"), handle.info.type
    bits = counter.bits or 8 * counter.element_bytes
    return Nature(kind in (MapType.ARRAY, MapType.PERCPU_ARRAY), kind in uapi.HASH_TYPES, bits)


def _take(handle: MapHandle, value: str) -> Baseline | None:
    """What the map holds now; ``None`` where the output cannot be read at all, as its reader will say."""
    layout = handle.layout
    assert layout is not None
    try:
        nature = nature_of(handle, layout, value)
        keys, values = maps.read(handle.fd, handle.info)
        numbers = decode.numbers(values, layout, value)
    except DecodeError:
        return None
    return baseline.take(
        map_name=handle.name, value=value, map_id=handle.info.id, since_ns=time.time_ns(), nature=nature,
        keys=keys, numbers=numbers,
    )  # fmt: skip


def _check_room(loaded: Loaded) -> None:
    everybody = [each for joined in loaded.joined.values() for each in joined.baselines.values()]
    for each in everybody:
        if each.size_bytes > baseline.MAX_BYTES:
            raise TooLarge(f"{each.map} held {each.size_bytes:,} bytes then; at most {baseline.MAX_BYTES:,} are kept")
    whole = sum(each.size_bytes for each in everybody)
    if whole > MAX_INSTANCE_BYTES:
        raise TooLarge(f"{whole:,} bytes for all its policies; at most {MAX_INSTANCE_BYTES:,} are kept")


def _of_manifest(told: Mapping[str, Any]) -> Joined:
    first, full, submitted, other = told["lost"]
    whole = {(name, value) for name, value in told["whole"]}
    return Joined(told["since_ns"], (first, full, submitted, other), told["misses"], told["said"], whole)
