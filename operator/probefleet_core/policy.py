"""A Kubernetes object in, a frozen value out, or everything that is wrong with it.

``handlers`` (operator) and ``probefleet check`` call ``parse_policy`` and ``parse_probe_map`` with the object as YAML
or the API server gave it. In a cluster the CRD has refused most mistakes already; on one machine this module is all
there is, so it holds the same bounds (``policy_shape``; a test compares them with the CRDs). Unknown fields are
refused with near matches, as ``kubectl`` does by its strict validation.

First the whole manifest is checked against its shape, so that a user hears of all problems at once; what is built
afterwards can rely on every type and bound.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping
from typing import Any, TypeAlias

from probefleet_core import (
    attach_shape,
    errors,
    interval_targets,
    network_targets,
    output_shape,
    policy_shape,
    quantities,
    shape,
    values,
)

API_VERSION = "probefleet.io/v1alpha1"
RESOURCES = ("ProbePolicy", "ProbeMap", "ProbeReport")
DEFAULT_INTERVAL_MS = 10_000
DEFAULT_LIMIT = 20
#: What a policy may cost on one node where it does not say: a tenth of a CPU, and maps as large as four catalog probes.
DEFAULT_BUDGET = values.Budget(cpu_millicores=100, map_memory_bytes=32 << 20)

# What has passed its shape: types are as the shape says, so reading them needs no further proof.
_Checked: TypeAlias = Mapping[str, Any]


def parse_policy(manifest: Mapping[str, object], *, namespace: str = "default") -> values.ProbePolicy:
    """The value of a ProbePolicy; raises ``errors.PolicyRefused`` with every problem found.

    ``namespace`` is for manifests without one. A manifest that never was in a cluster has no uid: it gets
    ``local-<namespace>-<name>``, so that one machine can tell its policies apart too.
    """
    problems = errors.Problems()
    metadata = _envelope(manifest, "ProbePolicy", policy_shape.SPEC, problems)
    if problems:
        raise errors.PolicyRefused(problems.found)
    spec: _Checked = manifest["spec"]  # type: ignore[assignment]  # a Record was checked
    pods = spec.get("pods")
    # BCC's bpf_log2l() counts one slot further than libbpf-tools' log2l().
    scale = values.Scale.LOG2_BCC if spec["program"].get("bcc") is not None else values.Scale.LOG2
    where = str(metadata.get("namespace") or namespace)
    return values.ProbePolicy(
        uid=values.PolicyUid(str(metadata.get("uid") or f"local-{where}-{metadata['name']}")),
        namespace=where,
        name=metadata["name"],
        generation=int(metadata.get("generation") or 1),
        created_ns=_time_ns(metadata.get("creationTimestamp")),
        deleting=bool(metadata.get("deletionTimestamp")),
        scope=values.Scope(spec.get("scope") or "Namespace"),
        program=_program(spec["program"]),
        nodes=_selector((spec.get("nodes") or {}).get("selector")),
        pods=None if pods is None else _selector(pods["selector"]),
        attach=tuple(_attachment(item) for item in spec.get("attach") or ()),
        maps=tuple(_map_use(item) for item in spec.get("maps") or ()),
        tail_calls=tuple(
            values.TailCalls(item["map"], tuple(sorted((int(slot), name) for slot, name in item["entries"].items())))
            for item in spec.get("tailCalls") or ()
        ),
        outputs=tuple(_output(item, scale) for item in spec.get("outputs") or ()),
        interval_ms=_milliseconds(spec.get("interval"), DEFAULT_INTERVAL_MS),
        ttl_ms=_milliseconds(spec.get("ttl"), 0),
        suspend=bool(spec.get("suspend")),
        budget=_budget(spec.get("budget") or {}),
    )


def parse_probe_map(manifest: Mapping[str, object], *, namespace: str = "default") -> values.ProbeMap:
    """The value of a ProbeMap; raises ``errors.ProbeMapRefused`` with every problem found."""
    problems = errors.Problems()
    metadata = _envelope(manifest, "ProbeMap", policy_shape.MAP_SPEC, problems)
    if problems:
        raise errors.ProbeMapRefused(problems.found)
    spec: _Checked = manifest["spec"]  # type: ignore[assignment]  # a Record was checked
    where = str(metadata.get("namespace") or namespace)
    return values.ProbeMap(
        uid=values.ProbeMapUid(str(metadata.get("uid") or f"local-{where}-{metadata['name']}")),
        namespace=where,
        name=metadata["name"],
        generation=int(metadata.get("generation") or 1),
        deleting=bool(metadata.get("deletionTimestamp")),
        type=values.MapType(spec["type"]),
        max_entries=spec.get("maxEntries") or 0,
        key=spec.get("key") or "",
        value=spec.get("value") or "",
        policies=tuple(spec.get("policies") or ()),
        inner=_inner(spec.get("inner")),
    )


def _inner(item: _Checked | None) -> values.InnerMaps | None:
    if item is None:
        return None
    key, value, keys = item.get("key") or "", item.get("value") or "", tuple(item.get("keys") or ())
    return values.InnerMaps(values.MapType(item["type"]), item["maxEntries"], key, value, keys)


def _envelope(manifest: Mapping[str, object], kind: str, spec: shape.Record, problems: errors.Problems) -> _Checked:
    """Check what is around and within the spec; answers the metadata."""
    # status is the operator's own; what stands in metadata is Kubernetes' business, but for the name.
    for name in manifest:
        if name not in ("apiVersion", "kind", "metadata", "spec", "status"):
            problems.add(
                str(name),
                "unknown field",
                why=f"a {kind} has no field of that name",
                write=errors.did_you_mean(str(name), ("apiVersion", "kind", "metadata", "spec"), what="field here"),
            )
    for name, wanted in (("apiVersion", API_VERSION), ("kind", kind)):
        if manifest.get(name) != wanted:
            problems.add(
                name,
                f'"{shape.shown(manifest[name])}"' if manifest.get(name) else "missing",
                why=f"this is read as a {kind} of {API_VERSION}",
                write=f"Write {name}: {wanted}.",
            )
    metadata = manifest.get("metadata")
    if not isinstance(metadata, Mapping):
        metadata = {}
    name_shape = shape.Text(
        max_length=policy_shape.MAX_NAME,
        min_length=1,
        pattern=policy_shape.DNS_SUBDOMAIN,
        write="Write lower-case letters, digits and -, such as slow-connects.",
    )
    shape.check(name_shape, metadata.get("name") or "", "metadata.name", problems)
    if manifest.get("spec") is None:
        problems.add("spec", "missing", why=f"a {kind} says there what it wants", write="Write spec: and its fields.")
    else:
        shape.check(spec, manifest["spec"], "spec", problems)
    return metadata


def _program(item: _Checked) -> values.Program:
    if item.get("catalog") is not None:
        parameters = item["catalog"].get("parameters") or {}
        return values.CatalogProgram(
            item["catalog"]["name"], tuple(sorted((name, str(value)) for name, value in parameters.items()))
        )
    if item.get("bcc") is not None:
        return values.BccProgram(item["bcc"]["source"])
    if item.get("bpftrace") is not None:
        return values.BpftraceProgram(item["bpftrace"]["script"])
    if item.get("c") is not None:
        return values.CProgram(item["c"]["source"])
    found = item["object"]
    reference = found.get("configMapKeyRef")
    return values.ObjectProgram(
        sha256=found["sha256"],
        inline=base64.b64decode(found["inline"]) if found.get("inline") else None,
        config_map=values.ConfigMapKey(reference["name"], reference["key"]) if reference else None,
    )


def _map_use(item: _Checked) -> values.MapUse:
    entries = item.get("values")
    return values.MapUse(
        name=item["name"],
        probe_map=(item.get("share") or {}).get("probeMap", ""),
        pinned=item.get("pinned") or "",
        max_entries=item.get("maxEntries") or 0,
        entries=None
        if entries is None
        else tuple(values.MapEntry(entry.get("key"), entry["value"]) for entry in entries),
    )


def _selector(item: _Checked | None) -> values.Selector:
    if not item:
        return values.Selector()
    return values.Selector(
        match_labels=tuple(sorted((item.get("matchLabels") or {}).items())),
        match_expressions=tuple(
            values.Requirement(each["key"], values.Operator(each["operator"]), tuple(each.get("values") or ()))
            for each in item.get("matchExpressions") or ()
        ),
    )


def _attachment(item: _Checked) -> values.Attachment:
    kind = next(name for name in attach_shape.TARGETS if item.get(name) is not None)
    return values.Attachment(item["program"], _target(kind, item[kind]))


def _target(kind: str, item: _Checked) -> values.Target:
    if kind in network_targets.SHAPES:
        return network_targets.parse(kind, item)
    if kind in interval_targets.SHAPES:
        return interval_targets.parse(kind, item)
    match kind:
        case "tracepoint":
            return values.Tracepoint(item["category"], item["name"])
        case "rawTracepoint":
            return values.RawTracepoint(item["name"])
        case "tpBtf":
            return values.BtfTracepoint(item["name"])
        case "kprobe" | "kretprobe" if item.get("functions"):
            return values.KprobePattern(item["functions"], kind == "kretprobe")
        case "fentry" | "fexit":
            return values.Fentry(item["function"], kind == "fexit")
        case "lsm":
            return values.Lsm(item["hook"])
        case "usdt":
            return values.Usdt(
                path=item.get("path") or item["library"],
                provider=item["provider"],
                name=item["name"],
                pid=item.get("pid") or 0,
                pods=bool(item.get("pods")),
            )
        case "kprobe" | "kretprobe":
            return values.Kprobe(item["function"], item.get("offset") or 0, kind == "kretprobe")
        case "uprobe" | "uretprobe":
            return values.Uprobe(
                path=item.get("path") or item["library"],
                symbol=item.get("symbol") or "",
                offset=item.get("offset") or 0,
                pid=item.get("pid") or 0,
                on_return=kind == "uretprobe",
                pods=bool(item.get("pods")),
            )
        case "perfEvent":
            return values.PerfEvent(item["event"], item.get("frequency") or 0, item.get("period") or 0)
        case _:
            return values.Syscall(item["name"], bool(item.get("return")))


def _output(item: _Checked, scale: values.Scale) -> values.Output:
    kind = values.Kind(next(name for name in output_shape.KINDS if item.get(name) is not None))
    histogram = item.get("histogram") or {}
    groups = item.get("groupBy")
    return values.Output(
        name=item["name"],
        map=item["from"]["map"],
        kind=kind,
        value=item["from"].get("value") or "",
        record=(item["from"].get("record") or "").removeprefix("struct "),
        merge=values.Merge((item.get("gauge") or {}).get("merge") or values.Merge.SUM),
        histogram=values.Histogram(
            values.Scale(histogram.get("scale") or scale),
            histogram.get("step") or 0,
            histogram.get("slots") or "",
        )
        if kind is values.Kind.HISTOGRAM
        else None,
        group_by=None if groups is None else tuple(dict.fromkeys(groups)),
        limit=item.get("limit") or DEFAULT_LIMIT,
        unit=item.get("unit") or histogram.get("unit") or "",
        decode=tuple(sorted((item.get("decode") or {}).items())),
    )


def _milliseconds(text: str | None, default: int) -> int:
    return quantities.duration_ns(text) // 1_000_000 if text else default


def _budget(item: _Checked) -> values.Budget:
    cpu, memory = item.get("cpu"), item.get("mapMemory")
    return values.Budget(
        cpu_millicores=DEFAULT_BUDGET.cpu_millicores if cpu is None else quantities.cpu_millicores(str(cpu)),
        map_memory_bytes=DEFAULT_BUDGET.map_memory_bytes if memory is None else quantities.memory_bytes(str(memory)),
    )


def _time_ns(text: object) -> int:
    """An RFC 3339 time of Kubernetes' (whole seconds, UTC); YAML readers may have made a datetime of it already."""
    if isinstance(text, str):
        text = datetime.datetime.fromisoformat(text)
    if not isinstance(text, datetime.datetime):
        return 0
    return int(text.replace(tzinfo=text.tzinfo or datetime.UTC).timestamp()) * 1_000_000_000
