"""The catalog: folders ``bpf/<probe>/`` and their compiled objects in, frozen descriptions of measurements out.

``planner`` makes plans of them, ``probefleet catalog`` prints them, ``probefleet run NAME`` looks them up. Reading
files happens in ``load`` alone; ``parse_probe`` is pure, and checks each probe.yaml against its object, so that a
catalog that loads names no parameter, program, map or field that the object lacks. ``bpf/README.md`` documents
probe.yaml. ``CatalogError`` is the fault of a release; what a user wrote wrongly is a ``ParameterError``.
"""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import yaml
from probefleet_wire.bpf_object import BpfObject, Variable
from probefleet_wire.btf_types import BtfError
from probefleet_wire.elf import ElfError

from probefleet_core import errors, values
from probefleet_core.parameters import Parameter, ParameterError, ParameterType

ENVIRONMENT = "PROBEFLEET_CATALOG"
OBJECTS_ENVIRONMENT = "PROBEFLEET_CATALOG_OBJECTS"
E = TypeVar("E", bound=enum.StrEnum)
#: libyaml, where PyYAML was built with it: each command reads the whole catalog, which takes PyYAML itself 0.1 s.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
IDENTITIES = ("namespace", "workload", "pod", "container")


class CatalogError(errors.CoreError):
    """A probe's folder contradicts itself or its object; the message names the file."""


class Identity(enum.StrEnum):
    """Whose cgroup an event is counted under."""

    CURRENT = "current"  #: the task that runs at the event
    TASK = "task"  #: a task that the event is about: the woken one
    SOCKET = "socket"  #: the one that made the socket
    ISSUE = "issue"  #: the one that issued the request, kept until it completes


@dataclass(frozen=True, slots=True)
class Attachment:
    """A program and its default target. Those of one ``alternative`` are ways to the same end, the best first.

    Several programs can be one ``way``; ``optional`` ones are left out where the kernel has no such place.
    """

    program: str
    target: values.Target
    alternative: str = ""
    way: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Map:
    """A map for people: what an entry is, and what happens when there is no room for another."""

    name: str
    holds: str
    full: str
    max_entries: int


@dataclass(frozen=True, slots=True)
class Output:
    """A default output, and the groupBy that makes sense for it (``node`` always does)."""

    output: values.Output
    allowed_group_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """A measurement that Probefleet ships."""

    name: str
    title: str
    description: str
    identity: Identity
    identity_says: str
    parameters: tuple[Parameter, ...]
    programs: tuple[Attachment, ...]
    maps: tuple[Map, ...]
    outputs: tuple[Output, ...]
    elf: bytes
    sha256: str
    frequency_parameter: str = ""  #: which parameter is the frequency of perf events

    def settings(self, given: Sequence[tuple[str, str]]) -> dict[str, str]:
        """Every parameter's text: what was given, else the default. ParameterError for a name that there is not."""
        result = {parameter.name: parameter.default for parameter in self.parameters}
        for name, text in given:
            if name not in result:
                raise ParameterError(
                    name,
                    why=f"{self.name} has no such parameter",
                    write=errors.did_you_mean(name, list(result), what="parameter"),
                )
            result[name] = text
        return result

    def variables(self, given: Sequence[tuple[str, str]], *, machine: str = "x86_64") -> dict[str, bytes]:
        """Variable → bytes, for all parameters that have one, in probe.yaml's order. ParameterError."""
        settings = self.settings(given)
        encoded = {each: each.encode(settings[each.name], machine=machine) for each in self.parameters if each.variable}
        return {parameter.variable: value for parameter, value in encoded.items()}

    def unfilled(self, given: Sequence[tuple[str, str]]) -> dict[str, str]:
        """Fields of keys that are 0 with these parameters, and the parameter that fills each. ParameterError."""
        settings = self.settings(given)
        return {
            each.fills: each.name for each in self.parameters if each.fills and not each.number(settings[each.name])
        }

    def attachments(self, given: Sequence[tuple[str, str]] = ()) -> tuple[Attachment, ...]:
        """Where the programs go, with these parameters. ParameterError."""
        if not self.frequency_parameter:
            return self.programs
        settings = self.settings(given)
        parameter = self.parameter(self.frequency_parameter)
        frequency = parameter.number(settings[parameter.name])
        return tuple(
            replace(each, target=values.PerfEvent(each.target.event, frequency_hz=frequency))
            if isinstance(each.target, values.PerfEvent)
            else each
            for each in self.programs
        )

    def parameter(self, name: str) -> Parameter:
        """The parameter of that name; KeyError."""
        return {each.name: each for each in self.parameters}[name]


@dataclass(frozen=True, slots=True)
class Catalog:
    """All probes by name, sorted."""

    probes: Mapping[str, Probe]
    endpoints: bytes = b""  #: the object of the built-in map, see ``endpoints``

    def get(self, name: str) -> Probe | None:
        """The probe of that name."""
        return self.probes.get(name)

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Sorted."""
        return tuple(self.probes)


EMPTY = Catalog(MappingProxyType({}))


# Reading files ----------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the catalog lies: ``PROBEFLEET_CATALOG``, else ``bpf/`` beside the packages, else in ours (a wheel)."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    here = Path(__file__).resolve()
    beside = here.parents[2] / "bpf"
    return beside if beside.is_dir() else here.parent / "bpf"


def objects_folder(catalog: Path) -> Path:
    """Where the objects lie: ``PROBEFLEET_CATALOG_OBJECTS``, else in the probes' folders, else ``build/bpf``."""
    named = os.environ.get(OBJECTS_ENVIRONMENT)
    return Path(named) if named else catalog.parent / "build" / "bpf"


def load(catalog: Path | None = None) -> Catalog:
    """Read every ``<catalog>/<probe>/probe.yaml`` and its object. CatalogError says which file and why."""
    catalog = catalog or folder()
    objects = objects_folder(catalog)
    probes = {}
    for path in sorted(catalog.glob("*/probe.yaml")):
        name = path.parent.name
        places = (path.parent / f"{name}.bpf.o", objects / f"{name}.bpf.o")
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise CatalogError(f"{path.parent}: the object {name}.bpf.o is missing; run `make bpf`")
        probes[name] = parse_probe(name, path.read_text(encoding="utf-8"), found.read_bytes())
    if not probes:
        raise CatalogError(f"{catalog} holds no probe; set {ENVIRONMENT} to the folder that does")
    endpoints = objects / "endpoints.bpf.o"
    return Catalog(MappingProxyType(probes), endpoints.read_bytes() if endpoints.is_file() else b"")


# Text and bytes to values -----------------------------------------------------------------------------------------


class _Fields:
    """One mapping of probe.yaml, read key by key; what is left at the end, or missing, is an error."""

    def __init__(self, where: str, data: object) -> None:
        if not isinstance(data, dict):
            raise CatalogError(f"{where}: expected a mapping, found {type(data).__name__}")
        self.where, self._left = where, dict(data)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._take(key, default)
        if not isinstance(value, str):
            raise CatalogError(f"{self.where}.{key}: expected text, found {value!r}; put it in quotes")
        return value

    def choice(self, key: str, choices: type[E]) -> E:
        value = self.text(key)
        try:
            return choices(value)
        except ValueError as error:
            there = ", ".join(str(each) for each in choices)
            raise CatalogError(f"{self.where}.{key}: {value!r} is none of {there}") from error

    def number(self, key: str, default: int | None = None) -> int | None:
        value = self._left.pop(key, default)
        if value is not None and not isinstance(value, int):
            raise CatalogError(f"{self.where}.{key}: expected a number, found {value!r}")
        return value

    def flag(self, key: str) -> bool:
        value = self._left.pop(key, False)
        if not isinstance(value, bool):
            raise CatalogError(f"{self.where}.{key}: expected true or false, found {value!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._left.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CatalogError(f"{self.where}.{key}: expected a list of texts, found {value!r}")
        return tuple(value)

    def items(self, key: str) -> Iterator[_Fields]:
        value = self._left.pop(key, [])
        if not isinstance(value, list):
            raise CatalogError(f"{self.where}.{key}: expected a list, found {value!r}")
        for index, item in enumerate(value):
            yield _Fields(f"{self.where}.{key}[{index}]", item)

    def fields(self, key: str) -> _Fields:
        return _Fields(f"{self.where}.{key}", self._take(key, None))

    def has(self, key: str) -> bool:
        return key in self._left

    def end(self) -> None:
        if self._left:
            raise CatalogError(f"{self.where}: unknown {', '.join(map(str, self._left))}")

    def _take(self, key: str, default: object) -> object:
        value = self._left.pop(key, default)
        if value is None:
            raise CatalogError(f"{self.where}: {key} is missing")
        return value


def parse_probe(name: str, text: str, elf: bytes) -> Probe:
    """probe.yaml's text and the object's bytes → a probe. CatalogError where they do not fit each other."""
    where = f"{name}/probe.yaml"
    try:
        top = _Fields(where, yaml.load(text, Loader=_Loader))
        compiled = BpfObject.parse(elf)
    except yaml.YAMLError as error:
        raise CatalogError(f"{where}: {error}") from error
    except (ElfError, BtfError) as error:
        raise CatalogError(f"{name}.bpf.o: {error}") from error
    if top.text("name") != name:
        raise CatalogError(f"{where}: name differs from the folder's")
    identity = top.fields("identity")
    variables = {variable.name: variable for variable in compiled.parameters()}
    parameters = tuple(_parameter(fields, variables) for fields in top.items("parameters"))
    programs, frequency = _programs(top, {program.name for program in compiled.programs})
    probe = Probe(
        name=name,
        title=top.text("title"),
        description=top.text("description"),
        identity=identity.choice("of", Identity),
        identity_says=identity.text("says"),
        parameters=parameters,
        programs=programs,
        maps=tuple(_map(fields, compiled) for fields in top.items("maps")),
        outputs=tuple(_output(fields, compiled) for fields in top.items("outputs")),
        elf=elf,
        sha256=hashlib.sha256(elf).hexdigest(),
        frequency_parameter=frequency,
    )
    identity.end()
    top.end()
    _check_whole(where, probe, compiled)
    return probe


def _parameter(fields: _Fields, variables: Mapping[str, Variable]) -> Parameter:
    name = fields.text("name")
    kind = fields.choice("type", ParameterType)
    attaches = fields.has("sets")
    if attaches and fields.text("sets") != "frequency":
        raise CatalogError(f"{fields.where}.sets: only `frequency` (of perf events) can be set")
    variable = "" if attaches else fields.text("variable", name)
    if variable and variable not in variables:
        raise CatalogError(f"{fields.where}: the object has no `const volatile` variable {variable!r}")
    parameter = Parameter(
        name=name,
        type=kind,
        default=fields.text("default"),
        doc=fields.text("doc"),
        unit=fields.text("unit", "ns" if kind is ParameterType.DURATION else ""),
        minimum=fields.number("minimum"),
        maximum=fields.number("maximum"),
        choices=fields.texts("choices"),
        variable=variable,
        size_bytes=variables[variable].size_bytes if variable else 8,
        fills=fields.text("fills", ""),
    )
    fields.end()
    try:
        encoded = parameter.encode(parameter.default)
    except (ParameterError, OverflowError) as error:
        raise CatalogError(f"{fields.where}.default: {error}") from error
    # The object alone must behave like the catalog says: `bpftool prog load` and users' copies start from it.
    if variable and variables[variable].initial != encoded:
        raise CatalogError(f"{fields.where}.default: {parameter.default!r} is not what {variable} is in the object")
    return parameter


def _programs(top: _Fields, there: set[str]) -> tuple[tuple[Attachment, ...], str]:
    attachments, frequency = [], ""
    for fields in top.items("programs"):
        program, target = fields.text("program"), fields.fields("target")
        if program not in there:
            raise CatalogError(f"{fields.where}: the object has no program {program!r}")
        alternative, way = fields.text("alternative", ""), fields.text("way", "")
        if way and not alternative:
            raise CatalogError(f"{fields.where}.way: a way leads to an alternative; alternative is missing")
        optional = fields.flag("optional")
        attachments.append(Attachment(program, _target(target), alternative, way, optional))
        frequency = frequency or (target.text("frequency", "") if target.has("frequency") else "")
        target.end()
        fields.end()
    return tuple(attachments), frequency


def _target(fields: _Fields) -> values.Target:
    if fields.has("tracepoint"):
        category, _, name = fields.text("tracepoint").partition(":")
        return values.Tracepoint(category, name)
    if fields.has("rawTracepoint"):
        return values.RawTracepoint(fields.text("rawTracepoint"))
    if fields.has("btfTracepoint"):
        return values.BtfTracepoint(fields.text("btfTracepoint"))
    if fields.has("kprobe"):
        return values.Kprobe(fields.text("kprobe"))
    if fields.has("kretprobe"):
        return values.Kprobe(fields.text("kretprobe"), on_return=True)
    if fields.has("fentry"):
        return values.Fentry(fields.text("fentry"))
    if fields.has("fexit"):
        return values.Fentry(fields.text("fexit"), on_return=True)
    if fields.has("perfEvent"):
        # Its frequency comes from the parameter that `frequency` names (Probe.attachments).
        return values.PerfEvent(fields.text("perfEvent"))
    known = "tracepoint, rawTracepoint, btfTracepoint, kprobe, kretprobe, fentry, fexit, perfEvent"
    raise CatalogError(f"{fields.where}: one of {known} is missing")


def _map(fields: _Fields, compiled: BpfObject) -> Map:
    name = fields.text("name")
    found = next((each for each in compiled.maps if each.name == name), None)
    if found is None:
        raise CatalogError(f"{fields.where}: the object has no map {name!r}")
    made = Map(name=name, holds=fields.text("holds"), full=fields.text("full"), max_entries=found.max_entries)
    fields.end()
    return made


def _output(fields: _Fields, compiled: BpfObject) -> Output:
    histogram = None
    if fields.has("histogram"):
        inner = fields.fields("histogram")
        scale, step = inner.choice("scale", values.Scale), inner.number("step", 0)
        histogram = values.Histogram(scale=scale, step=step or 0, slots=inner.text("slots"))
        inner.end()
    output = values.Output(
        name=fields.text("name"),
        map=fields.text("map"),
        kind=fields.choice("kind", values.Kind),
        value=fields.text("value", ""),
        histogram=histogram,
        group_by=fields.texts("groupBy"),
        limit=fields.number("limit", 20) or 20,
        unit=fields.text("unit", ""),
    )
    allowed = fields.texts("allowedGroupBy")
    fields.end()
    _check_fields(fields.where, output, allowed, compiled)
    return Output(output, allowed)


def _check_fields(where: str, output: values.Output, allowed: Sequence[str], compiled: BpfObject) -> None:
    found = next((each for each in compiled.maps if each.name == output.map), None)
    if found is None:
        raise CatalogError(f"{where}: the object has no map {output.map!r}")
    btf = compiled.btf
    keys = {field.name for field in btf.layout_of(found.key_type)} if btf and found.key_type else set()
    inside = {field.name for field in btf.layout_of(found.value_type)} if btf and found.value_type else set()
    if output.kind is values.Kind.EVENTS:
        known = {*IDENTITIES, *(f"value.{name}" for name in inside)}
    else:
        known = {*IDENTITIES, *(f"key.{name}" for name in keys)}
    for name in (*allowed, *(output.group_by or ())):
        if name not in known:
            raise CatalogError(f"{where}: groupBy {name!r} is not in {', '.join(sorted(known))}")
    if output.value and output.value not in inside:
        raise CatalogError(f"{where}: the map's value has no field {output.value!r}")
    if set(output.group_by or ()) - set(allowed):
        raise CatalogError(f"{where}: groupBy holds what allowedGroupBy does not")


def _check_whole(where: str, probe: Probe, compiled: BpfObject) -> None:
    groups = {name for each in probe.outputs for name in each.allowed_group_by}
    for each in probe.parameters:
        if each.fills and (each.type is not ParameterType.BOOLEAN or each.fills not in groups):
            raise CatalogError(
                f"{where}: {each.name} fills {each.fills!r}, which no output is grouped by, or is no boolean"
            )
    described = {each.name for each in probe.maps} | {"probefleet_lost", "probefleet_filter"}
    undescribed = {each.name for each in compiled.maps if not each.name.startswith(".")} - described
    if undescribed:
        raise CatalogError(f"{where}: maps does not say what {', '.join(sorted(undescribed))} holds")
    unattached = {program.name for program in compiled.programs} - {each.program for each in probe.programs}
    if unattached:
        raise CatalogError(f"{where}: programs does not say where {', '.join(sorted(unattached))} goes")
    if not probe.outputs:
        raise CatalogError(f"{where}: outputs is empty")
    if probe.frequency_parameter and probe.frequency_parameter not in {each.name for each in probe.parameters}:
        raise CatalogError(f"{where}: there is no parameter {probe.frequency_parameter!r} for the frequency")
