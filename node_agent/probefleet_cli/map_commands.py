"""``probefleet map list``, ``dump`` and ``set``: maps that are pinned on this machine, by policy and name, decoded.

Policies and layouts come from the manifests that lie beside the pins, so nothing is asked of an agent, and nothing of
what it reads is taken away. An entry that is set stays until a program, or the policy's own ``values``, change it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import yaml
from probefleet_agent import decode, names
from probefleet_agent import errors as agent_errors
from probefleet_agent.kernel import maps as kernel_maps
from probefleet_agent.kernel import mounts, pins, syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.syscall import MapInfo
from probefleet_agent.pinned_by_others import MARK
from probefleet_wire import encode, map_layout, map_types
from probefleet_wire.btf_layout import Field
from probefleet_wire.map_layout import LPM_KEY, OUTER_KEY, Layout
from probefleet_wire.map_types import MapType
from probefleet_wire.v1 import plan_pb2

from probefleet_cli import inspect
from probefleet_cli.failures import BadInput, Failure

Bytes = npt.NDArray[np.uint8]
_BPFFS = click.option(
    "--bpffs",
    type=click.Path(path_type=Path),
    default=mounts.BPFFS,
    show_default=True,
    envvar="PROBEFLEET_BPFFS",
    help="Where bpffs is mounted.",
)
_OUTPUT = click.option(
    "-o", "--output", type=click.Choice(("table", "json")), default="table", show_default=True, help="How to print."
)


@dataclass(frozen=True, slots=True)
class Pinned:
    """A map that is pinned here: whose it is, and how its bytes are read."""

    owners: tuple[str, ...]  #: ``namespace/name`` of the policies, or of the ProbeMap
    name: str
    path: Path
    layout: Layout | None
    of_others: str = ""  #: where its owner pinned it
    shared: bool = False  #: a ProbeMap, whose inner maps stand nowhere else


@click.group(name="map")
def maps() -> None:
    """List, read and write maps that run here."""


@maps.command(name="list")
@_OUTPUT
@_BPFFS
def list_maps(*, output: str, bpffs: Path) -> None:
    """Every map that is pinned here, by policy."""
    rows: list[dict[str, Any]] = []
    for each in _pinned(bpffs):
        try:
            with syscall.obj_get(str(each.path)) as fd:
                rows.append(_listed(each, fd, kernel_maps.info(fd)))
        except agent_errors.KernelError as error:
            if error.errno != errno.ENOENT:  # its policy has just gone
                raise Failure(str(error)) from error
    if output == "json":
        click.echo(json.dumps({"maps": rows}, indent=2, ensure_ascii=False))
        return
    if not rows:
        click.echo(f"no map of ours is pinned under {bpffs}", err=True)
        return
    columns = ("map", "id", "type", "entries", "bytes")
    shown = [(", ".join(row["policies"]), *(str(row[column]) for column in columns)) for row in rows]
    for line in inspect.table("POLICY", "MAP", "ID", "TYPE", "ENTRIES", "BYTES", rows=shown):
        if line:
            click.echo(line)


def _listed(found: Pinned, fd: Fd, info: MapInfo) -> dict[str, Any]:
    return {
        "policies": list(found.owners),
        "map": found.name,
        "id": info.id,
        "type": map_types.name_of(info.type),
        "entries": info.max_entries,
        "bytes": (kernel_maps.memory_with_inner_bytes if found.shared else kernel_maps.memory_used_bytes)(fd),
        "flags": inspect.flag_names(info.flags),
        "notRead": kernel_maps.why_not_read(info),
    }


@maps.command()
@click.argument("policy")
@click.argument("name", metavar="MAP")
@_OUTPUT
@_BPFFS
def dump(policy: str, name: str, *, output: str, bpffs: Path) -> None:
    """Print every entry of a map.

    POLICY is a ProbePolicy's or ProbeMap's name, or NAMESPACE/NAME.
    """
    found = _find(policy, name, bpffs)
    with _opened(found) as (fd, info), _words():
        entries = list(_entries(fd, info, found.layout))
    if output == "json":
        click.echo(json.dumps({"map": found.name, "entries": entries}, indent=2, ensure_ascii=False))
        return
    for entry in entries:
        click.echo(f"{_text(entry['key'])}: {_text(entry['value'])}")


@maps.command(name="set")
@click.argument("policy")
@click.argument("name", metavar="MAP")
@click.argument("key")
@click.argument("value", required=False)
@click.option("--delete", is_flag=True, help="Delete the entry instead.")
@_BPFFS
def set_entry(policy: str, name: str, key: str, value: str | None, *, delete: bool, bpffs: Path) -> None:
    """Write one entry, typed as the map is.

    KEY and VALUE are YAML, such as 7, 10.0.0.0/8 or '{pid: 7, uid: 0}'. A global variable's KEY (of .data, .bss) is its
    name.
    """
    if (value is None) != delete:
        raise BadInput("map set wants a VALUE, or --delete")
    found = _find(policy, name, bpffs)
    if found.of_others:
        raise BadInput(f"{found.name} is another owner's, pinned at {found.of_others}: Probefleet only reads it")
    layout = found.layout
    if layout is not None and found.name.startswith("."):
        _set_variable(found, layout, key, value)
        return
    if layout is None or not layout.key:
        raise BadInput(f"{found.name} has no key that BTF describes: it cannot be written to by hand")
    with _opened(found) as (fd, info), _words():
        if info.type not in {*map_types.HASHES, *map_types.ARRAYS, MapType.LPM_TRIE}:
            raise BadInput(
                f"{found.name} is of type {map_types.name_of(info.type)}: hashes, arrays and tries are written"
            )
        raw_key = _encoded(layout.key, layout.key_bytes, key, "key")
        if info.type in map_types.ARRAYS:
            place = int.from_bytes(raw_key, "little")
            if place >= info.max_entries:
                raise BadInput(f"{found.name} has no place {place}: it is an array of {info.max_entries}")
            if delete:
                raise BadInput(f"an entry of an array cannot be deleted, but set to zero: {found.name} is one")
        if delete:
            if not syscall.map_delete(fd, raw_key):
                raise Failure(f"{found.name} has no entry {key}")
            return
        raw = _encoded(layout.value, layout.value_bytes, value or "", "value")
        if info.type in map_types.PER_CPU:
            raw = raw.ljust(kernel_maps.round_up(len(raw), 8), b"\0") * kernel_maps.possible_cpus()
        syscall.map_update(fd, raw_key, raw)


def _set_variable(found: Pinned, layout: Layout, name: str, value: str | None) -> None:
    if value is None:
        raise BadInput(f"{name} is a global variable: it can be set, and not deleted")
    if found.name.startswith(".rodata"):
        raise BadInput(f"{found.name} is fixed once a program is loaded: write {name} into the policy's maps[].values")
    place = map_layout.variable(layout, name)
    if place is None:
        there = ", ".join(dict.fromkeys(field.name.partition(".")[0] for field in layout.value))
        raise BadInput(f"{found.name} has no variable {name}; it has: {there}")
    offset, own = place
    raw = _encoded(own.value, own.value_bytes, value, "variable")
    with _opened(found) as (fd, info), _words():
        kernel_maps.write_variables(fd, info, {offset: raw})


def _encoded(fields: tuple[Field, ...], size: int, text: str, what: str) -> bytes:
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"the {what} {text!r} is not YAML: {error}") from error
    try:
        return encode.encode(fields, size, given, whole=what == "key", what=what)
    except encode.EncodeError as error:
        raise BadInput(f"{what} {error}") from error


# Which maps there are.


def _pinned(bpffs: Path) -> Iterator[Pinned]:
    for folder in inspect.instance_folders(bpffs):
        told = _manifest(pins.root(folder.parents[2]).read_manifest, folder.name)
        if told is None:
            continue
        plans = [plan_pb2.Plan.FromString(base64.b64decode(text)) for text in told["plans"].values()]
        owners = tuple(sorted(f"{plan.namespace}/{plan.name}" for plan in plans))
        for path in sorted(folder.glob("map_*")):
            name = path.name.removeprefix("map_").replace("%", ".")
            shared = told["shared"].get(name, MARK)
            if shared.startswith(MARK):
                yield Pinned(owners, name, path, _layout(told["layouts"].get(name)), shared.removeprefix(MARK))
    for folder in sorted([*bpffs.glob("probefleet/maps/*"), *bpffs.glob("*/probefleet/maps/*")]):
        told = _manifest(lambda uid, at=folder: pins.root(at.parents[2]).open_map(uid), folder.name)
        if told is not None:
            spec = plan_pb2.ProbeMap.FromString(base64.b64decode(told["spec"]))
            owners, layout = (f"{spec.namespace}/{spec.name}",), _layout(told["layout"])
            yield Pinned(owners, spec.name, folder / "map_map", layout, shared=True)


def _manifest(read: Any, name: str) -> dict[str, Any] | None:
    """A folder's manifest; None for one that is being built or removed just now."""
    try:
        found = read(name)
    except agent_errors.KernelError:
        return None
    if isinstance(found, pins.Pinned):
        with found:
            found = found.manifest
    told: dict[str, Any] = json.loads(found)
    return told


def _layout(text: str | None) -> Layout | None:
    return Layout.from_json(text) if text else None


def _find(policy: str, name: str, bpffs: Path) -> Pinned:
    there = list(_pinned(bpffs))
    mine = [each for each in there if any(policy in (owner, owner.rpartition("/")[2]) for owner in each.owners)]
    if not mine:
        known = ", ".join(sorted({owner for each in there for owner in each.owners})) or "nothing"
        raise BadInput(f"no policy {policy} is pinned here; there is: {known}")
    found = [each for each in mine if each.name == name]
    if not found:
        raise BadInput(f"{policy} has no map {name}; it has: {', '.join(sorted(each.name for each in mine))}")
    if len(found) > 1:
        whose = "; ".join(", ".join(each.owners) for each in found)
        raise BadInput(f"{policy} is not one policy: write NAMESPACE/NAME ({whose})")
    return found[0]


@contextlib.contextmanager
def _opened(found: Pinned) -> Iterator[tuple[Fd, MapInfo]]:
    with _words(), syscall.obj_get(str(found.path)) as fd:
        yield fd, kernel_maps.info(fd)


@contextlib.contextmanager
def _words() -> Iterator[None]:
    try:
        yield
    except agent_errors.ProbefleetError as error:
        raise Failure(str(error)) from error


# What is in them.


def _entries(fd: Fd, info: MapInfo, layout: Layout | None) -> Iterator[dict[str, Any]]:
    if info.type == MapType.PROG_ARRAY:
        yield from _programs(fd, info)
        return
    keys, values = kernel_maps.read(fd, info)
    if not len(keys):
        return
    if layout is None:
        for key, value in zip(keys, values, strict=True):
            yield {"key": bytes(key).hex(), "value": value.tobytes().hex()}
        return
    shown_keys = _decoded(keys, layout.key) if layout.key else [None] * len(keys)
    if values.ndim == 2:
        shown = _decoded(values, layout.value)
    else:  # one value a CPU
        by_cpu = [_decoded(np.ascontiguousarray(values[:, cpu]), layout.value) for cpu in range(values.shape[1])]
        shown = [list(row) for row in zip(*by_cpu, strict=True)]
    for key, value in zip(shown_keys, shown, strict=True):
        yield {"key": key, "value": value}


def _programs(fd: Fd, info: MapInfo) -> Iterator[dict[str, Any]]:
    for slot in range(info.max_entries):
        found = syscall.map_lookup(fd, slot.to_bytes(4, "little"), 4)
        if found is not None:
            with syscall.fd_by_id("program", int.from_bytes(found, "little")) as program:
                told = syscall.program_info(program)
            yield {"key": slot, "value": {"program": told.name, "id": told.id}}


def _decoded(data: Bytes, fields: Sequence[Field]) -> list[Any]:
    """One value an entry: of a struct an object of its fields, of an LPM trie's key the prefix."""
    if LPM_KEY in fields[0].typedefs:
        fields = fields[:1]
    lookups = names.MachineLookups()
    columns = {field.name: _column(data, field, lookups) for field in fields}
    if list(columns) == [""]:
        return columns[""]
    # Of a map of maps with a plain inner key that key has no name of its own.
    named = {(name or "key") if OUTER_KEY in columns else name: column for name, column in columns.items()}
    return [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)]


def _column(data: Bytes, field: Field, lookups: names.MachineLookups) -> list[Any]:
    decoder = decode.decoder_of(field, {}, field.name)
    if field.shape and field.kind not in ("char", "bytes") and decoder in ("hex", "integer"):
        listed: list[Any] = decode.raw(data, field).tolist()
        return listed
    shown: list[Any] = decode.column(data, field, decoder, lookups).tolist()
    return shown


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_text(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_text(part) for part in value) + "]"
    return "" if value is None else str(value)
