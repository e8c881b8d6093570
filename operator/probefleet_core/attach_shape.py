"""The shape of ``spec.attach``: every kind of target and its bounds. Pure data; part of ``policy_shape``."""

from __future__ import annotations

from collections.abc import Mapping

from probefleet_core import errors, interval_targets, network_targets
from probefleet_core.shape import Flag, Record, Text, Union, Whole

C_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
TARGETS = (
    "tracepoint",
    "rawTracepoint",
    "tpBtf",
    "kprobe",
    "kretprobe",
    "fentry",
    "fexit",
    "lsm",
    "uprobe",
    "uretprobe",
    "usdt",
    "perfEvent",
    "syscall",
    *network_targets.SHAPES,
    *interval_targets.SHAPES,
)

C_IDENTIFIER = Text(max_length=128, min_length=1, pattern=C_NAME, write="Write the name as it stands in the C source.")
KERNEL_NAME = Text(
    max_length=128,
    min_length=1,
    pattern=r"[A-Za-z_][A-Za-z0-9_.]*",
    write="Write one name, such as tcp_sendmsg.",
)
KERNEL_PATTERN = Text(
    max_length=128,
    min_length=3,
    pattern=r"[A-Za-z0-9_.*?]*[A-Za-z_][A-Za-z0-9_.*?]*",
    write="Write a pattern such as tcp_*: letters, digits and _, * for any text, ? for one character.",
)
PATH = Text(
    max_length=1024,
    min_length=1,
    pattern=r"/[^\x00-\x1f]*",
    write="Write the file's absolute path on the node, such as /usr/lib/x86_64-linux-gnu/libc.so.6.",
)


def _uprobe_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    if not value.get("symbol") and not value.get("offset"):
        problems.add(
            path,
            "neither symbol nor offset",
            why="a uprobe needs a place in the file",
            write="Write symbol (a function's name), or offset (bytes into the file).",
        )


def _pods_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    if value.get("pods") and value.get("pid"):
        problems.add(
            f"{path}.pid",
            "pid with pods: true",
            why="a process is one of the node's, and pods are found by the policy's selector",
            write="Keep one of them.",
        )


OFFSET = Whole(0, (1 << 53) - 1)
LIBRARY = Text(
    max_length=128,
    min_length=1,
    pattern=r"[A-Za-z0-9_+][-A-Za-z0-9_.+]*",
    write="Write the library's name, such as libc, ssl or libpq.so.5; its file is found as programs find it.",
)
FILE = Union(("path", "library"), "file", "a probe in user space needs a file to be in")
PID = Whole(0, (1 << 22), write="Write a process id of the node; leave it away for every process.")
UPROBE = Record(
    "a user-space probe",
    {
        "path": PATH,
        "library": LIBRARY,
        "symbol": Text(max_length=512, min_length=1, pattern=r"[!-~]+", write="Write the function's (mangled) name."),
        "offset": OFFSET,
        "pid": PID,
        "pods": Flag(),
    },
    unions=(FILE,),
    rules=(_uprobe_rule, _pods_rule),
)
USDT_NAME = Text(
    max_length=128,
    min_length=1,
    pattern=r"[A-Za-z_][A-Za-z0-9_]*",
    write="Write the name as `readelf -n` shows it in the file's stapsdt notes.",
)
USDT = Record(
    "a static probe of user space",
    {"path": PATH, "library": LIBRARY, "provider": USDT_NAME, "name": USDT_NAME, "pid": PID, "pods": Flag()},
    required=("provider", "name"),
    unions=(FILE,),
    rules=(_pods_rule,),
)
PERF_EVENT = Record(
    "a perf event",
    {
        "event": Text(
            max_length=64,
            min_length=1,
            pattern=r"[a-z0-9]([-a-z0-9]*[a-z0-9])?",
            write="Write an event such as cpu-clock, page-faults or cpu-cycles.",
        ),
        "frequency": Whole(1, 10_000, write="Write samples a second on each CPU; 99 is usual."),
        "period": Whole(1, (1 << 53) - 1, write="Write how many events make one sample."),
    },
    required=("event",),
    unions=(Union(("frequency", "period"), "rate", "an event is sampled by time or by count"),),
)
TRACEPOINT_NAME = Record("a tracepoint", {"name": KERNEL_NAME}, required=("name",))
WHICH = Union(("function", "functions"), "function", "a kprobe is on one function, or on all that fit a pattern")


def _offset_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    if value.get("functions") is not None and value.get("offset"):
        problems.add(
            f"{path}.offset",
            f"{value['offset']} with a pattern",
            why="a place within one function says nothing about others",
            write="Leave offset away, or write function.",
        )


KPROBE = Record(
    "a kernel function",
    {"function": KERNEL_NAME, "functions": KERNEL_PATTERN, "offset": OFFSET},
    unions=(WHICH,),
    rules=(_offset_rule,),
)
KRETPROBE = Record(
    "a kernel function's return", {"function": KERNEL_NAME, "functions": KERNEL_PATTERN}, unions=(WHICH,)
)
FENTRY = Record("a kernel function", {"function": KERNEL_NAME}, required=("function",))
ATTACHMENT = Record(
    "an attachment",
    {
        "program": C_IDENTIFIER,
        "tracepoint": Record(
            "a tracepoint", {"category": KERNEL_NAME, "name": KERNEL_NAME}, required=("category", "name")
        ),
        "rawTracepoint": TRACEPOINT_NAME,
        "tpBtf": TRACEPOINT_NAME,
        "kprobe": KPROBE,
        "kretprobe": KRETPROBE,
        "fentry": FENTRY,
        "fexit": FENTRY,
        "lsm": Record("a security hook", {"hook": KERNEL_NAME}, required=("hook",)),
        "uprobe": UPROBE,
        "uretprobe": UPROBE,
        "usdt": USDT,
        "perfEvent": PERF_EVENT,
        "syscall": Record(
            "a system call",
            {
                "name": Text(
                    max_length=64,
                    min_length=1,
                    pattern=r"[a-z_][a-z0-9_]*",
                    write="Write the call's own name, such as execve, without sys_.",
                ),
                "return": Flag(),
            },
            required=("name",),
        ),
        **network_targets.SHAPES,
        **interval_targets.SHAPES,
    },
    required=("program",),
    unions=(Union(TARGETS, "target", "an attachment has one target"),),
)
