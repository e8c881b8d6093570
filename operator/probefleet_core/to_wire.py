"""Values in, the wire's messages out: one function a noun, no decisions. Called by ``planner``."""

from __future__ import annotations

from probefleet_wire.v1 import plan_pb2

from probefleet_core import interval_targets, network_targets, values

_KINDS = {
    values.Kind.COUNTER: plan_pb2.Output.COUNTER,
    values.Kind.GAUGE: plan_pb2.Output.GAUGE,
    values.Kind.HISTOGRAM: plan_pb2.Output.HISTOGRAM,
    values.Kind.TOPK: plan_pb2.Output.TOPK,
    values.Kind.STACKS: plan_pb2.Output.STACKS,
    values.Kind.EVENTS: plan_pb2.Output.EVENTS,
}
_MERGES = {
    values.Merge.SUM: plan_pb2.Output.SUM,
    values.Merge.MAX: plan_pb2.Output.MAX,
    values.Merge.MIN: plan_pb2.Output.MIN,
    values.Merge.LATEST: plan_pb2.Output.LATEST,
}
_SCALES = {
    values.Scale.LOG2: plan_pb2.Histogram.LOG2,
    values.Scale.LOG2_BCC: plan_pb2.Histogram.LOG2_BCC,
    values.Scale.LINEAR: plan_pb2.Histogram.LINEAR,
}


def scope(value: values.Scope) -> plan_pb2.Scope.ValueType:
    """The policy's scope."""
    return plan_pb2.SCOPE_CLUSTER if value is values.Scope.CLUSTER else plan_pb2.SCOPE_NAMESPACE


def output(value: values.Output) -> plan_pb2.Output:
    """One output; ``group_by`` has been decided by then."""
    made = plan_pb2.Output(
        name=value.name,
        map=value.map,
        value=value.value,
        kind=_KINDS[value.kind],
        group_by=value.group_by or (),
        merge=_MERGES[value.merge],
        unit=value.unit,
        limit=value.limit,
        decode=dict(value.decode),
        record=value.record,
    )
    if value.histogram is not None:
        made.histogram.scale = _SCALES[value.histogram.scale]
        made.histogram.step = value.histogram.step
        made.histogram.slots = value.histogram.slots
    return made


def attachment(
    value: values.Attachment, alternative: str = "", *, way: str = "", optional: bool = False
) -> plan_pb2.Attachment:
    """One attachment."""
    made = plan_pb2.Attachment(program=value.program, alternative=alternative, way=way, optional=optional)
    if isinstance(value.target, network_targets.TARGETS):
        network_targets.put(made, value.target)
        return made
    if isinstance(value.target, interval_targets.TARGETS):
        interval_targets.put(made, value.target)
        return made
    match value.target:
        case values.Tracepoint(category, name):
            made.tracepoint.CopyFrom(plan_pb2.Tracepoint(category=category, name=name))
        case values.RawTracepoint(name):
            made.raw_tracepoint.CopyFrom(plan_pb2.RawTracepoint(name=name))
        case values.BtfTracepoint(name):
            made.tp_btf.CopyFrom(plan_pb2.BtfTracepoint(name=name))
        case values.Kprobe(function, offset, on_return):
            made.kprobe.CopyFrom(plan_pb2.Kprobe(function=function, offset=offset, on_return=on_return))
        case values.KprobePattern(pattern, on_return):
            made.kprobe_pattern.CopyFrom(plan_pb2.KprobePattern(pattern=pattern, on_return=on_return))
        case values.Fentry(function, on_return):
            made.fentry.CopyFrom(plan_pb2.Fentry(function=function, on_return=on_return))
        case values.Lsm(hook):
            made.lsm.CopyFrom(plan_pb2.Lsm(hook=hook))
        case values.Usdt(path, provider, name, pid, pods):
            made.usdt.CopyFrom(plan_pb2.Usdt(path=path, provider=provider, name=name, pid=pid, pods=pods))
        case values.Uprobe(path, symbol, offset, pid, on_return, pods):
            made.uprobe.CopyFrom(
                plan_pb2.Uprobe(path=path, symbol=symbol, offset=offset, on_return=on_return, pid=pid, pods=pods)
            )
        case values.PerfEvent(event, frequency, period):
            made.perf_event.CopyFrom(plan_pb2.PerfEvent(event=event, frequency_hz=frequency, period=period))
        case values.Syscall(name, on_return):
            made.syscall.CopyFrom(plan_pb2.Syscall(name=name, on_return=on_return))
    return made


def kind_of(target: values.Target) -> str:
    """The target's member in ``spec.attach``."""
    if isinstance(target, network_targets.TARGETS):
        return network_targets.kind_of(target)
    if isinstance(target, interval_targets.TARGETS):
        return interval_targets.kind_of(target)
    match target:
        case values.Tracepoint():
            return "tracepoint"
        case values.RawTracepoint():
            return "rawTracepoint"
        case values.BtfTracepoint():
            return "tpBtf"
        case values.Kprobe(on_return=on_return) | values.KprobePattern(on_return=on_return):
            return "kretprobe" if on_return else "kprobe"
        case values.Fentry(on_return=on_return):
            return "fexit" if on_return else "fentry"
        case values.Lsm():
            return "lsm"
        case values.Usdt():
            return "usdt"
        case values.Uprobe(on_return=on_return):
            return "uretprobe" if on_return else "uprobe"
        case values.PerfEvent():
            return "perfEvent"
        case values.Syscall():
            return "syscall"


def describe(target: values.Target) -> str:
    """A target in words: ``kprobe tcp_sendmsg``."""
    if isinstance(target, network_targets.TARGETS):
        return f"{kind_of(target)} {network_targets.describe(target)}"
    if isinstance(target, interval_targets.TARGETS):
        return f"{kind_of(target)} {interval_targets.describe(target)}"
    match target:
        case values.Tracepoint(category, name):
            what = f"{category}:{name}"
        case values.RawTracepoint(name) | values.BtfTracepoint(name):
            what = name
        case values.Kprobe(function, offset, _):
            what = f"{function}+{offset}" if offset else function
        case values.KprobePattern(pattern, _):
            what = pattern
        case values.Fentry(function, _):
            what = function
        case values.Lsm(hook):
            what = hook
        case values.Usdt(path, provider, name, pods=pods):
            what = f"{path}:{provider}:{name}" + (" in pods" if pods else "")
        case values.Uprobe(path, symbol, offset, pods=pods):
            place = f"{symbol}+{offset}" if symbol and offset else symbol or f"0x{offset:x}"
            what = f"{path}:{place}" + (" in pods" if pods else "")
        case values.PerfEvent(event, frequency, period):
            what = f"{event} {f'{frequency} Hz' if frequency else f'every {period}'}"
        case values.Syscall(name, on_return):
            what = f"{name} (return)" if on_return else name
    return f"{kind_of(target)} {what}"
