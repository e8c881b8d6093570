"""A catalog probe, loaded and attached by the agent's own kernel modules: how the catalog's tests run it.

In: a probe's name and parameters. Out: its maps as NumPy records by the names that BTF gives, its ring's records, its
losses. What the engine does with plans is left out on purpose: here the question is what the kernel counts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator
from typing import cast

import numpy as np
import numpy.typing as npt
from probefleet_agent import ways as agents_ways
from probefleet_agent.kernel import libbpf, links, maps, rings
from probefleet_core import catalog, values
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.v1 import plan_pb2

from tests.kernel.support import REPOSITORY

Rows = npt.NDArray[np.void]


@functools.cache
def the_catalog() -> catalog.Catalog:
    """The catalog of this tree, built."""
    if not os.environ.get(catalog.OBJECTS_ENVIRONMENT):
        subprocess.run(["make", "-C", str(REPOSITORY / "bpf"), "--silent"], check=True, capture_output=True)
    return catalog.load(REPOSITORY / "bpf")


def wire(attachment: catalog.Attachment) -> plan_pb2.Attachment:
    """As the plan would say it."""
    made = plan_pb2.Attachment(
        program=attachment.program,
        alternative=attachment.alternative,
        way=attachment.way,
        optional=attachment.optional,
    )
    match attachment.target:
        case values.Tracepoint(category, name):
            made.tracepoint.category, made.tracepoint.name = category, name
        case values.RawTracepoint(name):
            made.raw_tracepoint.name = name
        case values.BtfTracepoint(name):
            made.tp_btf.name = name
        case values.Kprobe(function, offset, on_return):
            made.kprobe.function, made.kprobe.offset, made.kprobe.on_return = function, offset, on_return
        case values.Fentry(function, on_return):
            made.fentry.function, made.fentry.on_return = function, on_return
        case values.PerfEvent(event, frequency_hz, period):
            made.perf_event.event, made.perf_event.frequency_hz = event, frequency_hz
            made.perf_event.period = period
        case other:
            raise AssertionError(f"no catalog probe uses {other}")
    return made


def ways(probe: catalog.Probe, prefer: str = "") -> tuple[catalog.Attachment, ...]:
    """Of each alternative the first way that this kernel has, or that whose programs end so, or which is called so."""
    return tuple(each for each in probe.attachments() if each.program in _chosen(probe.name, prefer))


@functools.cache
def _chosen(name: str, prefer: str) -> frozenset[str]:
    """The programs. Whether a function can be traced is dear to ask, in an emulated machine by seconds."""
    probe = the_catalog().probes[name]
    preferred = sorted(
        probe.attachments(), key=lambda each: bool(prefer) and prefer != each.way and not each.program.endswith(prefer)
    )
    asked = [wire(each) for each in preferred]
    found = agents_ways.choose(asked, [links.supported(each) for each in asked], name)
    return frozenset(each.program for each in found)


class Running:
    """A probe that counts, until its ``with`` block ends."""

    def __init__(self, name: str, *, prefer: str = "", sizes: dict[str, int] | None = None, **given: str) -> None:
        found = the_catalog().get(name)
        assert found is not None, name
        self.probe, self._open = found, contextlib.ExitStack()
        self.object = BpfObject.parse(found.elf)
        chosen = {each.program: wire(each) for each in self._with_parameters(found, prefer, given)}
        with self._open, libbpf.open_object(found.elf, name) as opened:
            filter_on = given.pop("filter_on", "")
            for variable, value in found.variables(tuple(given.items()), machine=os.uname().machine).items():
                opened.set_rodata(variable, value)
            if filter_on:
                opened.set_rodata("probefleet_filter_on", b"\x01")
            for map_name, count in (sizes or {}).items():
                opened.set_max_entries(map_name, count)
            for program in opened.program_names:
                opened.set_autoload(program, program in chosen)
            opened.load()
            self.maps = {each: self._open.enter_context(opened.map_fd(each)) for each in opened.map_names}
            for program, attachment in chosen.items():
                with opened.program_fd(program) as fd:
                    self._open.enter_context(links.attach(fd, attachment))
            self._open = self._open.pop_all()

    @staticmethod
    def _with_parameters(probe: catalog.Probe, prefer: str, given: dict[str, str]) -> tuple[catalog.Attachment, ...]:
        settings = tuple((key, value) for key, value in given.items() if key != "filter_on")
        chosen = {each.program for each in ways(probe, prefer)}
        return tuple(each for each in probe.attachments(settings) if each.program in chosen)

    def rows(self, name: str, *, cgroup: int | None = None) -> tuple[Rows, Rows]:
        """(keys, values) of a hash, by field name; only those of a cgroup, where it is given. Per CPU: (n, cpus)."""
        definition = next(each for each in self.object.maps if each.name == name)
        btf = self.object.btf
        assert btf is not None
        keys, contents = maps.read(self.maps[name], maps.info(self.maps[name]))
        typed = np.ascontiguousarray(keys).view(btf.dtype_of(definition.key_type)).reshape(len(keys))
        value_type = btf.dtype_of(definition.value_type)
        inner = np.ascontiguousarray(contents[..., : value_type.itemsize]).view(value_type)
        inner = inner.reshape(inner.shape[:-1])
        if cgroup is not None:
            wanted = typed["cgroup"] == cgroup
            typed, inner = typed[wanted], inner[wanted]
        return typed, inner

    def records(self, name: str = "events", *, cgroup: int | None = None) -> Rows:
        """All records of the ring so far."""
        definition = next(each for each in self.object.maps if each.name == name)
        btf = self.object.btf
        assert btf is not None
        record = cast("np.dtype[np.void]", btf.dtype_of(definition.value_type))  # a struct's, as all records
        with rings.RingReader(self.maps[name]) as ring:
            found = ring.read(ring.consumer_position()).array(record)
        return found if cgroup is None else found[found["cgroup"] == cgroup]

    def refuse(self, cgroup: int) -> None:
        """Say that a cgroup's events are not wanted."""
        key = np.array([[cgroup]], "<u8").view(np.uint8)
        maps.update_many(self.maps["probefleet_filter"], key, np.array([[2]], np.uint8))

    def lost(self) -> list[int]:
        """[failed updates, ring full, submitted, other]"""
        return [int(each) for each in maps.sum_lost(self.maps["probefleet_lost"])]

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


@contextlib.contextmanager
def running(name: str, **given: object) -> Iterator[Running]:
    """Load and attach; detach and free at the end."""
    with Running(name, **given) as probe:  # type: ignore[arg-type]
        yield probe
