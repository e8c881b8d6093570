"""Manifests in, a Push for this machine's engine out: what the operator does for a fleet, done once for one machine.

    sources.read ─▶ policy.parse_* ─▶ clang where there is C ─▶ planner.plan ─▶ push

``prepare`` raises ``BadInput`` for what the user wrote, as one text with everything that is wrong in all files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import zstandard
from probefleet_core import catalog as catalog_module
from probefleet_core import errors as core_errors
from probefleet_core import planner, policy, values
from probefleet_wire import clang, sandbox
from probefleet_wire.v1 import stream_pb2

from probefleet_cli import failures, local_pods, one_process, selectors
from probefleet_cli.failures import BadInput, Failure
from probefleet_cli.sources import Source

TERM = 1
EVERYBODY = selectors.Choice()
Compile = Callable[[str, str], bytes]
"""(source, file name) → ELF; raises Failure."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One policy, ready for the engine; ``where`` is its source in words."""

    where: str
    policy: values.ProbePolicy
    planned: planner.Planned


def compile_source(source: str, file_name: str) -> bytes:
    """clang, locked in. BadInput for mistakes in the source, Failure where this machine cannot compile."""
    include = catalog_module.folder() / "include"
    try:
        return clang.compile_core(source, name=file_name, include_dirs=[include]).object
    except clang.CompileError as error:
        raise BadInput(f"{file_name} does not compile:\n{error}") from error
    except (clang.ClangError, sandbox.SandboxError) as error:
        raise Failure(f"{file_name} cannot be compiled here: {error}") from error


def prepare(
    sources: Sequence[Source],
    *,
    catalog: catalog_module.Catalog,
    namespace: str = "default",
    pid: int = 0,
    choice: selectors.Choice = EVERYBODY,
    node_count: int = 1,
    compile_source: Compile = compile_source,
) -> list[Prepared]:
    """The plans of all policies; BadInput names every problem of every source. ``choice`` narrows them all, and is
    refused where a program cannot tell pods apart.
    """
    problems: list[str] = []
    maps = _probe_maps(sources, namespace, compile_source, problems)
    found: list[Prepared] = []
    for source in sources:
        if source.kind != "ProbePolicy":
            continue
        where = f"{source.where}, {choice.words}" if choice else source.where
        try:
            parsed = choice.narrow(policy.parse_policy(source.manifest, namespace=namespace))
            planned = planner.plan(
                parsed,
                catalog=catalog,
                elf=_object(parsed, source.where, compile_source),
                probe_maps=maps.get(parsed.namespace, {}),
                node_count=node_count,
                cpus=os.cpu_count() or 1,
            )
            if pid:
                one_process.restrict(planned, pid, source.where)
            found.append(Prepared(source.where, parsed, planned))
        except core_errors.Refused as refusal:
            problems.append(str(failures.refused(where, refusal)))
        except BadInput as error:
            problems.append(f"{source.where}: {error}" if source.where not in str(error) else str(error))
    if problems:
        raise BadInput("\n".join(problems))
    if not found:
        raise BadInput("there is no ProbePolicy among these objects. Add one that uses the ProbeMap")
    return found


def push(
    prepared: Sequence[Prepared], *, pods: local_pods.LocalPods, namespace: str | None, version: int
) -> stream_pb2.Push:
    """This machine's whole desired state."""
    made = stream_pb2.Push(term=TERM, version=version, known_pod_uids=sorted(judged(prepared, pods, namespace)))
    maps: dict[str, None] = {}
    blobs: dict[str, bytes] = {}
    for each in prepared:
        made.plans.append(each.planned.plan)
        chosen = selected(each.policy, pods, namespace)
        selector = f"{namespace or each.policy.scope.value}: {each.policy.pods or 'everything'}"
        made.selections.append(
            stream_pb2.Selection(
                policy_uid=each.policy.uid, everything=chosen is None, pod_uids=chosen or (), selector=selector
            )
        )
        for probe_map in each.planned.probe_maps:
            if probe_map.uid not in maps:
                maps[probe_map.uid] = None
                made.probe_maps.append(probe_map)
        blobs.update(each.planned.objects)
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)
    for sha256, data in sorted(blobs.items()):
        made.blobs.append(stream_pb2.Blob(sha256=sha256, zstd=compressor.compress(data)))
    return made


def judged(prepared: Sequence[Prepared], pods: local_pods.LocalPods, namespace: str | None) -> frozenset[str]:
    """Uids of the pods of which it is known whether they are wanted.

    Where labels are asked for, not before they have been told: the kubelet's folders name a pod a moment earlier than
    the runtime does, and what it does meanwhile is to be counted until then.
    """
    if all(each.policy.pods is None for each in prepared):
        return frozenset(pods.names)
    wanted = (selected(each.policy, pods, namespace) or () for each in prepared)
    return frozenset(pods.labels).union(*wanted)


def selected(policy: values.ProbePolicy, pods: local_pods.LocalPods, namespace: str | None) -> tuple[str, ...] | None:
    """Uids of the pods on this machine whose events a policy wants; None: everyone's, the host's too.

    Scope Cluster sees everything, unless ``namespace`` or labels narrow it; scope Namespace sees the pods of
    ``namespace``, else of the policy's own.
    """
    whose = namespace or ("" if policy.scope is values.Scope.CLUSTER else policy.namespace)
    if not whose and policy.pods is None:
        return None
    return pods.chosen(whose, policy.pods)


def _probe_maps(
    sources: Sequence[Source], namespace: str, compile_source: Compile, problems: list[str]
) -> Mapping[str, Mapping[str, planner.CompiledProbeMap]]:
    """Namespace → name → ProbeMap; what is wrong goes to ``problems``."""
    found: dict[str, dict[str, planner.CompiledProbeMap]] = {}
    for source in sources:
        if source.kind != "ProbeMap":
            continue
        try:
            parsed = policy.parse_probe_map(source.manifest, namespace=namespace)
            elf = compile_source(planner.probe_map_source(parsed), f"{parsed.name}.probemap.c")
            compiled = planner.CompiledProbeMap(parsed, elf)
            planner.plan_probe_map(compiled)
            found.setdefault(parsed.namespace, {})[parsed.name] = compiled
        except core_errors.Refused as refusal:
            problems.append(str(failures.refused(source.where, refusal)))
        except BadInput as error:
            problems.append(f"{source.where}: {error}")
    return found


def _object(parsed: values.ProbePolicy, where: str, compile_source: Compile) -> bytes | None:
    program = parsed.program
    if isinstance(program, values.CProgram):
        return compile_source(program.source, f"{parsed.name}.bpf.c")
    if isinstance(program, values.ObjectProgram):
        if program.inline is None:
            raise BadInput(
                f"{where}: spec.program.object.configMapKeyRef: there are no ConfigMaps on one machine. "
                "Write the object itself, in base64, as spec.program.object.inline"
            )
        return program.inline
    return None
