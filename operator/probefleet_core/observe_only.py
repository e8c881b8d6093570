"""Probefleet watches and changes nothing: which programs are refused, and where those that may run are attached. Pure.

An object's SEC() names say what its programs are; its instructions say which helpers they call. Whatever could change a
packet, a verdict or a process is refused here, before a node hears of it; the agent checks again what BCC compiles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.btf_types import Kind
from probefleet_wire.elf import Elf
from probefleet_wire.observe_only import REFUSED_HELPERS, named_by_number, refused_helpers

from probefleet_core import interval_targets, network_targets, values

_REFUSED_WORD = re.compile(rf"\b({'|'.join(REFUSED_HELPERS.values())})\b")
# Functions of the kernel (kfuncs) that only look, or hold a reference while they do.
_WATCHING_KFUNC = re.compile(
    r"bpf_(rcu_read_(un)?lock|preempt_(dis|en)able|cast_to_kern_ctx|rdonly_cast|iter_\w+|dynptr_(adjust|clone|is_\w+|size|"
    r"slice)|(task|cgroup|cpumask)_(acquire|release|from_\w+|ancestor|under_cgroup|get\w*|first\w*|test_cpu|empty|full|"
    r"weight|any_distribute)|get_kmem_cache|strn?\w+|copy_from_user\w*|get_(dentry|file)_xattr|path_d_path|session_\w+)"
)
#: First word of a SEC() name whose program decides about something, and what it decides about.
_DECIDES = {
    "xdp": "packets",
    "tc": "packets",
    "tcx": "packets",
    "classifier": "packets",
    "action": "packets",
    "netkit": "packets",
    "netfilter": "packets",
    "lwt_in": "packets",
    "lwt_out": "packets",
    "lwt_xmit": "packets",
    "lwt_seg6local": "packets",
    "flow_dissector": "packets",
    "socket": "packets",
    "sk_skb": "sockets",
    "sk_msg": "sockets",
    "sk_lookup": "sockets",
    "sk_reuseport": "sockets",
    "sockops": "sockets",
    "cgroup": "what a cgroup may do",
    "cgroup_skb": "packets",
    "lsm_cgroup": "permissions",
    "fmod_ret": "what a kernel function returns",
    "struct_ops": "how the kernel works",
    "freplace": "another program",
    "lirc_mode2": "input",
}
_LATER = [
    "uprobe.multi",
    "uretprobe.multi",
    "kprobe.session",
]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a program may not run; ``what``, ``why`` and ``write`` as in ``errors.Problem``."""

    what: str
    why: str
    write: str


@dataclass(frozen=True, slots=True)
class Section:
    """What a SEC() name means: the kinds of target that fit (as in ``spec.attach``), and the target that it names."""

    fits: tuple[str, ...]
    target: values.Target | None
    optional: bool = False  #: SEC("?…"): not loaded unless attached


def refused_in_object(data: bytes, parsed: BpfObject) -> Iterator[Refusal]:
    """What the whole object may not call: helpers by their numbers, kfuncs by their names."""
    called: dict[str, None] = {}
    for section in Elf.parse(data).sections:
        if section.executable:
            called |= dict.fromkeys(refused_helpers(section.data))
            for what in named_by_number(section.data):
                yield Refusal(
                    f"it names {what}",
                    "a number could be of any map that the agent has open",
                    "Name the map in C: a compiler leaves a relocation.",
                )
    for name in called:
        yield _calls(name)
    btf = parsed.btf
    ksyms = btf.datasec(".ksyms") if btf else None
    if btf is None or ksyms is None:
        return
    for each in ksyms.variables:
        name = btf.name_of(each.type)
        if btf.kind_of(each.type) is Kind.FUNC and not _WATCHING_KFUNC.fullmatch(name):
            yield _calls(name)


def refused_in_source(source: str) -> Iterator[Refusal]:
    """The same for BCC's C, by name. Macros can hide a call: the agent looks at the instructions."""
    for name in sorted(set(_REFUSED_WORD.findall(source))):
        yield _calls(name)


def _calls(name: str) -> Refusal:
    return Refusal(
        f"it calls {name}",
        "Probefleet observes only, and that call can change what it watches",
        "Leave the call away.",
    )


def read_section(section: str) -> Section | Refusal:
    """What a SEC() name means, by libbpf's rules."""
    optional = section.startswith("?")
    kind, _, rest = section.removeprefix("?").partition("/")
    word = kind.removesuffix(".s")
    if network := network_targets.read_section(section):
        return Section(network.fits, network.target, optional)
    if each := interval_targets.read_section(section):
        return Section(*each, optional)
    if word in ("tracepoint", "tp"):
        category, _, name = rest.partition("/")
        return Section(("tracepoint", "syscall"), values.Tracepoint(category, name) if name else None, optional)
    if word in ("raw_tracepoint", "raw_tp"):
        return Section(("rawTracepoint",), values.RawTracepoint(rest) if rest else None, optional)
    if word == "tp_btf":
        return Section(("tpBtf",), values.BtfTracepoint(rest) if rest else None, optional)
    if word in ("kprobe", "kretprobe"):
        return Section(("kprobe", "kretprobe", "syscall"), _kprobe(rest, word == "kretprobe"), optional)
    if word in ("kprobe.multi", "kretprobe.multi"):
        pattern = values.KprobePattern(rest, word == "kretprobe.multi") if rest else None
        return Section(("kprobe", "kretprobe"), pattern, optional)
    if word in ("fentry", "fexit"):
        return Section(("fentry", "fexit"), values.Fentry(rest, word == "fexit") if rest else None, optional)
    if word == "lsm":
        return Section(("lsm",), values.Lsm(rest) if rest else None, optional)
    if word == "usdt":
        return Section(("usdt",), _usdt(rest), optional)
    if word in ("ksyscall", "kretsyscall"):
        target = values.Syscall(rest, word == "kretsyscall") if rest else None
        return Section(("syscall", "kprobe", "kretprobe"), target, optional)
    if word in ("uprobe", "uretprobe"):
        return Section(("uprobe", "uretprobe"), _uprobe(rest, word == "uretprobe"), optional)
    if word == "perf_event":
        return Section(("perfEvent",), None, optional)
    decides = _DECIDES.get(re.split(r"[./]", word)[0])
    if word in ("raw_tracepoint.w", "raw_tp.w"):
        decides = "the arguments of a tracepoint"
    if decides:
        return Refusal(
            f'SEC("{section}")',
            f"Probefleet observes only, and a program of that type decides about {decides}",
            "Watch the same place by a tracepoint, tp_btf or kprobe program.",
        )
    known = "of a type that is not supported yet" if word in _LATER else "of no type that Probefleet knows"
    return Refusal(
        f'SEC("{section}")',
        f"the program is {known}",
        "Use tracepoint, raw_tp, tp_btf, fentry, fexit, kprobe, kretprobe, ksyscall, uprobe, uretprobe, usdt or "
        "perf_event.",
    )


def _kprobe(rest: str, on_return: bool) -> values.Target | None:
    function, _, offset = rest.partition("+")
    return values.Kprobe(function, _number(offset), on_return) if function else None


def _uprobe(rest: str, on_return: bool) -> values.Target | None:
    path, _, place = rest.partition(":")
    symbol, _, offset = place.partition("+")
    if not place:
        return None
    path = _file(path)
    if re.fullmatch(r"0x[0-9a-fA-F]+|[0-9]+", symbol):
        return values.Uprobe(path, offset=_number(symbol), on_return=on_return)
    return values.Uprobe(path, symbol, _number(offset), on_return=on_return)


def _usdt(rest: str) -> values.Target | None:
    path, _, probe = rest.partition(":")
    provider, _, name = probe.partition(":")
    return values.Usdt(_file(path), provider, name) if path and provider and name else None


def _file(path: str) -> str:
    """A name without a slash is looked up on the node; of a path SEC() may have eaten the first slash."""
    return path if path.startswith("/") or "/" not in path else f"/{path}"


def _number(text: str) -> int:
    return int(text, 0) if re.fullmatch(r"0x[0-9a-fA-F]+|[1-9][0-9]*|0", text) else 0
