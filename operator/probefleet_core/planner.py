"""A policy and its compiled object in, a ``Plan`` for the nodes out. Pure and deterministic.

::

    policy.parse_policy ─▶ planner.wants ─▶ toolchain (clang), ConfigMap, catalog ─▶ planner.plan ─▶ placement

``plan`` reads the object's ELF and BTF, so that what cannot work is said before a node hears of it: unknown catalog
names, parameters, maps and fields, programs that could change what they watch, maps over the budget. The instance's
digest covers everything that makes a running instance differ, and nothing else: policies that differ in outputs,
selectors or intervals share one program on the hook.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from probefleet_core import catalog as catalog_module
from probefleet_core import values
from probefleet_wire.v1 import plan_pb2


class ObjectFrom(enum.Enum):
    """Who has to provide the compiled object before ``plan`` can be called."""

    CATALOG = "catalog"  #: bpf/<probe>, compiled with the release
    COMPILER = "compiler"  #: clang, from spec.program.c.source
    CONFIG_MAP = "configMap"  #: spec.program.object.configMapKeyRef
    INLINE = "inline"  #: spec.program.object.inline
    NOBODY = "nobody"  #: bcc: compiled on the node


@dataclass(frozen=True, slots=True)
class CompiledProbeMap:
    """A ProbeMap and the object that clang made of ``probe_map_source``."""

    probe_map: values.ProbeMap
    elf: bytes


@dataclass(frozen=True, slots=True)
class Summary:
    """What ``probefleet explain`` shows of a plan."""

    programs: tuple[str, ...]  #: "on_switch: tp_btf sched_switch"
    maps: tuple[tuple[str, int], ...]  #: name → bytes on one node, estimated for ``cpus``
    map_bytes: int  #: their sum
    pins: tuple[str, ...]  #: paths below the bpffs mount
    verbs: tuple[str, ...]  #: RBAC rules that the applying user needs: "create probepolicies.probefleet.io", …


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, the bytes it refers to, and what it amounts to."""

    plan: plan_pb2.Plan
    objects: Mapping[str, bytes]  #: sha256 (hex) → ELF: what Push.blobs has to carry
    probe_maps: tuple[plan_pb2.ProbeMap, ...]  #: those that the plan shares
    summary: Summary


def object_from(policy: values.ProbePolicy) -> ObjectFrom:
    """Who provides the object of this policy's program."""
    raise NotImplementedError


def plan(
    policy: values.ProbePolicy,
    *,
    catalog: catalog_module.Catalog,
    elf: bytes | None,
    probe_maps: Mapping[str, CompiledProbeMap],
    node_count: int = 1,
    cpus: int = 1,
) -> Planned:
    """The plan of a policy; raises ``errors.PolicyRefused`` with every problem found.

    ``elf`` is the CO-RE object that ``object_from`` names (for ``CATALOG`` it may be None: the catalog's own is taken;
    for ``NOBODY`` it is None). ``probe_maps`` are those of the policy's namespace by name; ones that do not compile are
    left out by the caller. ``node_count`` and ``cpus`` (of the largest node) are for messages and estimates only: the
    plan does not depend on them.
    """
    raise NotImplementedError


def probe_map_source(probe_map: values.ProbeMap) -> str:
    """C text for clang: an object without programs whose one map, ``shared``, is this ProbeMap."""
    raise NotImplementedError


def plan_probe_map(compiled: CompiledProbeMap) -> plan_pb2.ProbeMap:
    """The wire's ProbeMap; raises ``errors.ProbeMapRefused`` where the object's map is not what was asked for."""
    raise NotImplementedError
