"""``probefleet inspect``: what is in an object file, or in a program that the kernel runs, as a loader sees it.

A file is only read, never loaded: its programs, maps, variables and the places where a loader has to put a map. Of a
loaded program (by instance or kernel id) the same places hold the maps' kernel ids.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from probefleet_agent import errors as agent_errors
from probefleet_agent.kernel import mounts, pins, syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_core import legacy_maps
from probefleet_wire import bpf_object, map_layout, map_types, translated
from probefleet_wire.btf_types import BtfError
from probefleet_wire.elf import ElfError

from probefleet_cli import workspace
from probefleet_cli.failures import BadInput, Failure

Facts = dict[str, Any]


@click.command(name="inspect")
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--instance", metavar="DIGEST", help="The programs of an instance that is pinned on this machine.")
@click.option(
    "--program-id", type=click.IntRange(min=1), metavar="NUMBER", help="Any loaded program, by its kernel id."
)
@click.option("-o", "--output", type=click.Choice(("table", "json")), default="table", show_default=True)
@click.option(
    "--bpffs",
    type=click.Path(path_type=Path),
    default=mounts.BPFFS,
    show_default=True,
    envvar="PROBEFLEET_BPFFS",
    help="Where bpffs is mounted.",
)
def inspect(file: Path | None, *, instance: str | None, program_id: int | None, output: str, bpffs: Path) -> None:
    """Look into an object, or a loaded program.

    Of FILE.o: its programs, maps, layouts, and the places where a loader puts maps. Of a loaded program: the kernel ids
    of the maps in these places.
    """
    if sum(given is not None for given in (file, instance, program_id)) != 1:
        raise BadInput("inspect wants one thing to look at: FILE, --instance DIGEST or --program-id NUMBER")
    if file is not None:
        found = of_object(file.read_bytes(), str(file))
        lines = _object_lines(found)
    else:
        found = {"programs": list(_loaded(instance, program_id, bpffs))}
        lines = _loaded_lines(found)
    if output == "json":
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for line in lines:
        click.echo(line)


# A file.


def of_object(data: bytes, name: str) -> Facts:
    """Everything that a loader reads from an object; BadInput where it is none."""
    try:
        translated_maps = legacy_maps.translate(data)
        parsed = bpf_object.BpfObject.parse(translated_maps)
    except (ElfError, BtfError) as error:
        raise BadInput(f"{name} is no BPF object that can be read: {error}") from error
    except legacy_maps.LegacyMapsError as error:
        raise BadInput(f'{name} has maps in SEC("maps"): {error}. Write {error.write}') from error
    return {
        "file": name,
        "licence": parsed.licence,
        "legacyMaps": translated_maps is not data,
        "btfTypes": len(parsed.btf) if parsed.btf else 0,
        "programs": [
            {"name": each.name, "section": each.section, "instructions": each.instruction_count}
            for each in parsed.programs
        ],
        "maps": [_map(parsed, each) for each in parsed.all_maps],
        "variables": [
            {"name": each.name, "section": each.section, "offset": each.offset_bytes, "bytes": each.size_bytes}
            for each in parsed.variables
        ],
        "relocations": [
            {"section": each.section, "program": each.program, "offset": f"0x{each.offset_bytes:02x}", "map": each.map}
            for each in parsed.references
        ],
    }


def _map(parsed: bpf_object.BpfObject, found: bpf_object.MapDef) -> Facts:
    layout = map_layout.layout_of(parsed, found)
    return {
        "name": found.name,
        "type": map_types.name_of(found.type),
        "entries": found.max_entries,
        "key": map_layout.words(layout.key_bytes, layout.key) if layout else f"{found.key_bytes} bytes",
        "value": map_layout.words(layout.value_bytes, layout.value) if layout else f"{found.value_bytes} bytes",
        "flags": flag_names(found.flags),
        "pinning": found.pinning,
        "slots": {str(slot): name for slot, name in found.slots},
    }


def flag_names(flags: int) -> list[str]:
    """``["no_prealloc", "mmapable"]``."""
    return [flag.name.lower() for flag in map_types.Flag if flags & flag and flag.name]


def _object_lines(found: Facts) -> Iterator[str]:
    types = f"BTF with {found['btfTypes']:,} types" if found["btfTypes"] else "no BTF (compile with -g)"
    yield f"{found['file']}: licence {found['licence'] or 'not said'}, {types}"
    if found["legacyMaps"]:
        yield 'its maps are in SEC("maps"); they are shown, and loaded, as BTF has them'
    programs = [(each["name"], f'SEC("{each["section"]}")', f"{each['instructions']:,}") for each in found["programs"]]
    yield from table("PROGRAM", "SECTION", "INSTRUCTIONS", rows=programs)
    maps = []
    for each in found["maps"]:
        notes = each["flags"] + [f"[{slot}] = {name}" for slot, name in each["slots"].items()]
        notes += [f"pinning {each['pinning']}"] if each["pinning"] else []
        maps.append((each["name"], each["type"], f"{each['entries']:,}", each["key"], each["value"], ", ".join(notes)))
    yield from table("MAP", "TYPE", "ENTRIES", "KEY", "VALUE", "", rows=maps)
    places = [
        (each["offset"], each["section"], each["program"] or "(a function)", each["map"])
        for each in found["relocations"]
    ]
    yield from table("AT", "SECTION", "PROGRAM", "MAP", rows=places)


# A loaded program.


def _loaded(instance: str | None, program_id: int | None, bpffs: Path) -> Iterator[Facts]:
    try:
        with contextlib.ExitStack() as opened:
            for name, fd in _programs(instance, program_id, bpffs, opened).items():
                yield _program(name, fd)
    except agent_errors.ProbefleetError as error:
        raise Failure(f"the kernel does not show it: {error}") from error


def _programs(instance: str | None, program_id: int | None, bpffs: Path, opened: contextlib.ExitStack) -> dict[str, Fd]:
    if program_id is not None:
        fd = opened.enter_context(syscall.fd_by_id("program", program_id))
        return {syscall.program_info(fd).name: fd}
    folders = [folder for folder in instance_folders(bpffs) if folder.name.startswith(instance or "")]
    if len(folders) != 1:
        there = ", ".join(folder.name for folder in instance_folders(bpffs)) or "none"
        raise BadInput(f"--instance {instance}: {len(folders)} instances begin so; pinned here: {there}")
    pinned = opened.enter_context(pins.root(folders[0].parents[2]).open_instance(folders[0].name))
    return pinned.programs


def instance_folders(bpffs: Path) -> list[Path]:
    """Every instance pinned on this machine, of the agent and of runs under way. Failure for who may not see them."""
    workspace.check_readable(bpffs)
    found = [*bpffs.glob("probefleet/instances/*"), *bpffs.glob("*/probefleet/instances/*")]
    return sorted(path for path in found if not path.name.startswith(("new-", "gone-")))


def _program(name: str, fd: Fd) -> Facts:
    info = syscall.program_info(fd)
    code = syscall.program_instructions(fd)
    maps = {}
    for map_id in info.map_ids:
        with syscall.fd_by_id("map", map_id) as map_fd:
            told = syscall.map_info(map_fd)
        maps[map_id] = {"id": map_id, "name": told.name, "type": map_types.name_of(told.type)}
    return {
        "id": info.id,
        "name": name,
        "tag": info.tag,
        "instructions": len(code) // bpf_object.INSTRUCTION_BYTES,
        "verifiedInstructions": info.verified_instructions,
        "maps": [maps[map_id] for map_id in info.map_ids],
        "references": [
            {"offset": f"0x{each.offset_bytes:02x}", "mapId": each.map_id, "map": maps.get(each.map_id, {}).get("name")}
            for each in translated.map_references(code)
        ],
    }


def _loaded_lines(found: Facts) -> Iterator[str]:
    for each in found["programs"]:
        yield f"{each['name']}: id {each['id']}, tag {each['tag']}, {each['instructions']:,} instructions"
        maps = [(str(one["id"]), one["name"], one["type"]) for one in each["maps"]]
        yield from table("MAP ID", "MAP", "TYPE", rows=maps)
        places = [(one["offset"], str(one["mapId"]), one["map"] or "") for one in each["references"]]
        yield from table("AT", "MAP ID", "MAP", rows=places)


def table(*titles: str, rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns under titles, after an empty line; nothing where there are no rows."""
    if not rows:
        return
    yield ""
    every = [titles, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(titles))]
    for row in every:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
