"""An object's network programs: what speaks against them, and the object with their verdicts fixed. Pure.

``program_parts`` asks for every object. Programs that no target names are looked at as well: tail calls may lead there.
"""

from __future__ import annotations

from collections.abc import Iterator

from probefleet_wire import bpf_code, network_programs, verdicts
from probefleet_wire.bpf_object import BpfObject

from probefleet_core import network_targets

#: Of one program; the rest is of the same kind.
MAX_OBJECTIONS = 4


def kinds(parsed: BpfObject) -> dict[str, network_programs.Kind]:
    """The object's network programs by name."""
    sections = {program.name: network_targets.read_section(program.section) for program in parsed.programs}
    return {name: section.kind for name, section in sections.items() if section}


def objections(data: bytes, parsed: BpfObject) -> Iterator[tuple[str, str, str]]:
    """(what, why, what to write) for all that could change what is watched. Raises ``ElfError`` or ``BtfError``."""
    found = kinds(parsed)
    if not found:
        return
    code = bpf_code.read(data)
    for program, kind in found.items():
        against = list(network_programs.objections(code, program, kind, verdict_is_fixed=False))
        for each in against[:MAX_OBJECTIONS]:
            line = parsed.line_of(program, each.instruction) if each.function == program else None
            place = f"line {line.line} of {line.file}" if line else f"instruction {each.instruction} of {each.function}"
            yield (
                f"{program}: {each.what} ({place})",
                f"Probefleet observes only: a program of type {kind.name} may change neither packet nor verdict",
                each.write,
            )


def fixed(data: bytes, parsed: BpfObject) -> bytes:
    """The object as it is sent to nodes: its network programs let everything pass, whatever they return."""
    found = kinds(parsed)
    return verdicts.fixed(data, {name: kind.verdict for name, kind in found.items()}) if found else data
