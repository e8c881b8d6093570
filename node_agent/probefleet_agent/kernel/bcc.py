"""BCC's C in, a frozen program out: instructions, maps, their layouts. No kernel headers, no privilege, no LLVM here.

``compile`` is called by the executor for an instance with ``bcc``. It starts ``bcc_child`` in the sandbox (1 s, 150 MB,
gone afterwards: BCC gives its memory back in no other way) and reads one bounded JSON object from it. libbcc creates no
maps: each reference to one in the instructions is noted, and ``BccFunction.linked`` puts the caller's descriptors in,
so that BCC's programs go through the same ``bpf(2)`` gate, budget, pins and sharing as all others.

Layouts come from the BTF that BCC itself makes, so a typedef (``user_id_t``) still says what a field means.

A result depends on nothing but the source, its name, the kernel's types and the tracepoints that it names; the caller
may keep it by that (``Known``), mistakes included.
"""

from __future__ import annotations

import base64
import ctypes.util
import json
import platform
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex

from probefleet_wire import clang, kept, map_layout, map_types, sandbox
from probefleet_wire.bpf_object import MapDef
from probefleet_wire.btf import Btf
from probefleet_wire.btf_layout import Field
from probefleet_wire.btf_types import BtfError, Kind, Struct, TypeId

from probefleet_agent.errors import ProbefleetError, UnsupportedFeature
from probefleet_agent.kernel import bcc_headers, bcc_lines, bcc_source, btf_kernel, features, mounts, targets
from probefleet_agent.kernel.uapi import MapType

CHILD = Path(__file__).with_name("bcc_child.py")
# libbcc asks how many CPUs there are: a perf buffer's map has one entry for each.
CPUS = (Path("/sys/devices/system/cpu/possible"), Path("/sys/devices/system/cpu/online"))
LIMITS = sandbox.Limits(memory_bytes=2 << 30, cpu_seconds=60, wall_seconds=120, output_bytes=16 << 20)
MAX_SOURCE_BYTES = 96 << 10
MAX_INSTRUCTIONS = 1_000_000
FLAGS = (
    # BCC brings a bpf.h of its own, of another kernel: these are its include guards.
    "-D_UAPI__LINUX_BPF_H__",
    "-D__LINUX_BPF_H__",
    *("-include", "vmlinux.h"),
    "-DCONFIG_BPF_SYSCALL",
    "-Wno-address-of-packed-member",
    "-Wno-unknown-attributes",
    # A function that nobody declared would become a call that no verifier understands.
    "-Werror=implicit-function-declaration",
)
_ARCHITECTURES = {"x86_64": "-DCONFIG_X86_64", "aarch64": "-DCONFIG_ARM64"}
# Map types that take no BTF: ENOTSUPP (kernel/bpf/syscall.c, map_check_btf; the same list is in libbpf).
_WITHOUT_BTF = frozenset(
    {
        *(MapType.PROG_ARRAY, MapType.PERF_EVENT_ARRAY, MapType.STACK_TRACE, MapType.RINGBUF),
        *(8, 12, 13),  # cgroup array, array and hash of maps
    }
)
_LOAD_IMMEDIATE, _PSEUDO_MAP_FD = 0x18, 1


class BccUnavailable(UnsupportedFeature):
    """BCC cannot compile on this node: libbcc or the kernel's BTF is missing."""


class CompileFailed(ProbefleetError):
    """The policy's C does not compile; ``str()`` is clang's text with the policy's line numbers, bounded."""

    reason = "CompileFailed"

    def __init__(self, error: clang.CompileError) -> None:
        self.error = error
        self.diagnostics = error.diagnostics
        super().__init__(str(error))


@dataclass(frozen=True, slots=True)
class BccFunction:
    """One program. ``references`` says which instructions load which map's address."""

    name: str
    hint: bcc_source.Hint
    instructions: bytes
    references: tuple[tuple[int, str], ...]  #: (instruction, map)
    #: bpf_func_info and bpf_line_info records for BPF_PROG_LOAD, with the size of one; strings are in the BTF.
    function_records: tuple[bytes, int] = (b"", 0)
    line_records: tuple[bytes, int] = (b"", 0)

    def linked(self, fds: Mapping[str, SupportsIndex]) -> bytes:
        """The instructions with the caller's map descriptors in place, ready for BPF_PROG_LOAD."""
        code = bytearray(self.instructions)
        for instruction, name in self.references:
            struct.pack_into("<i", code, instruction * 8 + 4, int(fds[name].__index__()))
        return bytes(code)

    def line_of(self, instruction: int) -> int:
        """The line of the policy's source that an instruction comes from; 0 where the compiler does not say."""
        data, size = self.line_records
        line = 0
        for at in range(0, len(data) - size + 1, size or 1):
            first, _, _, place = bcc_lines.RECORD.unpack_from(data, at)
            if first > instruction:
                break
            line = place >> bcc_lines.COLUMN_BITS
        return line


@dataclass(frozen=True, slots=True)
class BccMap:
    """One map; ``definition`` as from an object, ``record`` the layout of a perf or ring buffer's records."""

    definition: MapDef
    key: tuple[Field, ...]
    value: tuple[Field, ...]
    record: tuple[Field, ...] = ()
    record_bytes: int = 0
    inner: str = ""  #: the map that an array or hash of maps holds the likes of

    @property
    def name(self) -> str:
        """Its name in the program."""
        return self.definition.name

    @property
    def takes_btf(self) -> bool:
        """BPF_MAP_CREATE may be given its BTF types: there are some, and the kernel lets this type have them."""
        return bool(self.definition.key_type) and self.definition.type not in _WITHOUT_BTF


@dataclass(frozen=True, slots=True)
class BccProgram:
    """What a policy's C became. ``btf_bytes`` is for BPF_BTF_LOAD; ``btf`` the same, read."""

    functions: tuple[BccFunction, ...]
    maps: tuple[BccMap, ...]
    licence: str
    kernel_version: int
    btf_bytes: bytes
    btf: Btf | None
    warnings: tuple[clang.Diagnostic, ...]
    seconds: float
    peak_bytes: int

    @property
    def size_bytes(self) -> int:
        """About what it takes in memory: instructions, and BTF as bytes and read."""
        code = sum(len(each.instructions) + len(each.line_records[0]) for each in self.functions)
        return code + 4 * len(self.btf_bytes) + 4096


Known = kept.Kept[BccProgram | clang.CompileError]


def compile(  # noqa: A001 (bcc.compile reads as it should)
    source: str,
    *,
    name: str = "policy.c",
    cflags: Sequence[str] = (),
    timeout_seconds: float = LIMITS.wall_seconds,
    vmlinux: Path | None = None,
    headers_root: Path = bcc_headers.ROOT,
    tracepoint_format: Callable[[str, str], str] | None = None,
    known: Known | None = None,
) -> BccProgram:
    """Compile a policy's BCC program against this node's kernel. Blocks for about a second (13 s under emulation).

    ``tracepoint_format(category, name)`` returns the text of a tracepoint's ``format`` file, from tracefs by default.
    ``known`` is asked before the compiler is, and gets what came of it.
    Raises ``CompileFailed`` (the user's C), ``NoSuchTarget`` (a tracepoint), ``BccUnavailable`` and
    ``sandbox.SandboxUnavailable`` (this node).
    """
    if len(source.encode()) > MAX_SOURCE_BYTES:
        raise _failed(name, f"the source has more than {MAX_SOURCE_BYTES >> 10} KiB")
    if ctypes.util.find_library("bcc") is None:
        raise BccUnavailable("BCC", why="libbcc is not installed; Debian: apt install libbpfcc")
    try:
        types = vmlinux.read_bytes() if vmlinux else btf_kernel.data()
    except (OSError, UnsupportedFeature) as error:
        raise BccUnavailable("types for BCC", why=str(error)) from error
    tree = bcc_headers.tree(types, root=headers_root)
    formats = [
        bcc_source.tracepoint_struct(*each, (tracepoint_format or _format)(*each))
        for each in bcc_source.tracepoints(source)
    ]
    limits = replace(LIMITS, wall_seconds=timeout_seconds)
    flags = [*FLAGS, *([_ARCHITECTURES[platform.machine()]] if platform.machine() in _ARCHITECTURES else []), *cflags]
    if bcc_source.reads_usdt(source) and features.cookies():
        flags.append("-DPROBEFLEET_COOKIES")
    if known is None:
        return _compile(source, name, flags, tree, formats, limits)
    # The tree's name is the digest of the kernel's BTF, and of what we make headers of.
    key = kept.digest(part.encode() for part in (source, name, tree.name, *flags, *formats))
    found = known.get(key)
    if isinstance(found, clang.CompileError):
        raise CompileFailed(found)
    if found is not None:
        return found
    try:
        made = _compile(source, name, flags, tree, formats, limits)
    except CompileFailed as problem:
        if problem.error.lasting:
            known.put(key, problem.error, len(str(problem)))
        raise
    known.put(key, made, made.size_bytes)
    return made


def _compile(
    source: str, name: str, flags: Sequence[str], tree: Path, formats: Sequence[str], limits: sandbox.Limits
) -> BccProgram:
    leave: frozenset[int] = frozenset()
    for attempt in range(3):
        text = bcc_source.prepared(source, keep=attempt < 2, leave=leave)
        finished = _run(text, source, flags, tree, formats, limits)
        # A struct that the preprocessor leaves out cannot be kept; the last attempt is without descriptions of records.
        leave |= bcc_source.not_kept(finished.stderr.decode("utf-8", "replace"))
        if finished.status == 0 or not leave:
            break
    diagnostics = clang.read_diagnostics(
        finished.stderr.decode("utf-8", "replace").replace(bcc_source.FILE, name), name, source, [f"{tree}/include/"]
    )
    errors = [each for each in diagnostics if each.kind == "error"]
    if finished.limit:
        raise _failed(name, clang.limit_words(finished, limits), lasting=finished.limit != "wall")
    if errors:
        raise CompileFailed(clang.CompileError(errors))
    if finished.status != 0 or b"\0" not in finished.stdout:
        tail = finished.stderr[-600:].decode("utf-8", "replace").strip()
        raise _failed(name, f"BCC ended with status {finished.status}: {tail or 'it said nothing'}", lasting=False)
    told = json.loads(finished.stdout.partition(b"\0")[2])
    try:
        return _program(told, diagnostics, finished, name, bcc_source.written(source))
    except BtfError as error:
        raise _failed(name, f"BCC described its maps wrongly: {error}") from error


def _run(
    text: str, source: str, flags: Sequence[str], tree: Path, formats: Sequence[str], limits: sandbox.Limits
) -> sandbox.Finished:
    with tempfile.TemporaryDirectory(prefix="probefleet-bcc-") as folder:
        include = Path(folder).resolve() / "include"
        files = dict.fromkeys(bcc_source.wrappers(source), bcc_headers.WRAPPER)
        files = {name: made for name, made in files.items() if not (tree / "include" / name).exists()}
        files["probefleet_tracepoints.h"] = "".join(formats)
        for name, content in files.items():
            path = include / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        for path in (include, *include.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        prints = bcc_source.prints(source)
        more = ["-include", "probefleet_bcc.h"] if prints or bcc_source.includes_ours(source) else []
        more += ["-include", "probefleet_bcc_print.h"] if prints else []
        asked = {
            "source": bcc_source.numbered(bcc_source.prologue(source, _defined_by_both(source, tree)) + text),
            "cflags": [f"-I{include}", *flags, "-include", "probefleet_tracepoints.h", *more],
            "kernel_source": str(tree),
        }
        return sandbox.run(
            [CHILD],
            grants=sandbox.Grants(Path(folder).resolve(), (tree, CHILD, *CPUS)),
            limits=limits,
            stdin=json.dumps(asked).encode(),
            script=True,
            # seccomp to hand bpf(2) over, ioctl to answer it; bpf itself is refused to the thread that answers.
            more_syscalls=("bpf", "ioctl", "seccomp"),
        )


def _defined_by_both(source: str, tree: Path) -> tuple[str, ...]:
    """Structs that the program defines though the kernel's types have them: kernels keep some in their own .c files."""
    names = bcc_source.structs(source)
    if not names:
        return ()
    types = (tree / "include" / "vmlinux.h").read_text()
    return tuple(name for name in names if f"\nstruct {name} {{" in types or f"\nunion {name} {{" in types)


def _format(category: str, name: str) -> str:
    targets.tracepoint_id(category, name)  # says what is wrong with the name
    root = mounts.tracefs()
    assert root is not None
    return (root / "events" / category / name / "format").read_text()


def _failed(name: str, text: str, *, lasting: bool = True) -> CompileFailed:
    return CompileFailed(clang.CompileError([clang.Diagnostic(name, 0, 0, "error", text)], lasting=lasting))


def _program(
    told: dict[str, Any],
    diagnostics: tuple[clang.Diagnostic, ...],
    finished: sandbox.Finished,
    file_name: str,
    lines: Sequence[str],
) -> BccProgram:
    """Check and name what the child told: it ran a compiler over a user's text, so it is believed nothing."""
    btf_bytes = base64.b64decode(told["btf"])
    names = {int(table["fd"]): str(table["name"]) for table in told["tables"]}
    functions = tuple(_function(each, names) for each in told["functions"])
    functions, btf_bytes = bcc_lines.as_written(functions, btf_bytes, file_name, lines)
    btf = Btf.parse(btf_bytes) if btf_bytes else None
    return BccProgram(
        functions=functions,
        maps=tuple(_map(each, names, btf) for each in told["tables"]),
        licence=str(told["licence"]),
        kernel_version=int(told["kernel_version"]),
        btf_bytes=btf_bytes,
        btf=btf,
        warnings=tuple(each for each in diagnostics if each.kind == "warning"),
        seconds=finished.seconds,
        peak_bytes=finished.peak_bytes,
    )


def _function(told: dict[str, Any], names: Mapping[int, str]) -> BccFunction:
    name, code = str(told["name"]), base64.b64decode(told["instructions"])
    if len(code) % 8 or len(code) > MAX_INSTRUCTIONS * 8:
        raise _failed(name, f"BCC made {len(code)} bytes of it, no whole number of instructions")
    references = []
    index = 0
    while index < len(code) // 8:
        operation, registers, _, immediate = struct.unpack_from("<BBhi", code, index * 8)
        wide = operation == _LOAD_IMMEDIATE
        if wide and registers >> 4 == _PSEUDO_MAP_FD:
            if immediate not in names:
                raise _failed(name, f"instruction {index} uses a map that BCC did not name ({immediate})")
            references.append((index, names[immediate]))
        index += 2 if wide else 1
    functions, lines = _records(told, "function", 8), _records(told, "line", bcc_lines.RECORD.size)
    return BccFunction(name, bcc_source.hint_of(name), code, tuple(references), functions, lines)


def _records(told: Mapping[str, Any], word: str, least_bytes: int) -> tuple[bytes, int]:
    data, size = base64.b64decode(told.get(f"{word}_records", "")), int(told.get(f"{word}_record_bytes", 0))
    return (data, size) if size >= least_bytes and not len(data) % size else (b"", 0)


def _map(told: dict[str, Any], names: Mapping[int, str], btf: Btf | None) -> BccMap:
    definition = MapDef(
        name=str(told["name"]),
        type=int(told.get("type", 0)),
        key_bytes=int(told.get("key_bytes", 0)),
        value_bytes=int(told.get("value_bytes", 0)),
        max_entries=int(told.get("max_entries", 0)),
        flags=int(told.get("flags", 0)),
        numa_node=int(told.get("numa_node", 0)),
    )
    if not definition.type:
        raise _failed(definition.name, "the map takes its place from another process; write it as a map of its own")
    key, value = int(told.get("key_type", 0)), int(told.get("value_type", 0))
    if definition.name == bcc_source.PRINT_RING:
        record, record_bytes = _struct(bcc_source.PRINT_RECORD, btf)
    elif definition.type in map_types.POPPED:
        record, record_bytes = _annotated(definition.name, btf)
    else:
        record, record_bytes = _record([str(each) for each in told["event_fields"]], btf)
    if btf is not None and key and value:
        sizes = btf.size_of(key), btf.size_of(value)
        if sizes != (definition.key_bytes, definition.value_bytes):
            raise BtfError(f"map {definition.name!r} has {definition.key_bytes} and {definition.value_bytes} bytes, "
                           f"its types {sizes[0]} and {sizes[1]}")  # fmt: skip
        definition = replace(definition, key_type=TypeId(key), value_type=TypeId(value))
    described = btf is not None and definition.key_type
    return BccMap(
        definition=definition,
        key=map_layout.key_of(btf, definition)[0] if btf is not None and described else (),
        value=btf.layout_of(value) if btf is not None and described else (),
        record=record,
        record_bytes=record_bytes,
        inner=names.get(int(told.get("inner_fd", 0)), ""),
    )


def _record(fields: Sequence[str], btf: Btf | None) -> tuple[tuple[Field, ...], int]:
    """The layout of what is submitted. BCC tells ``name#type`` of its members; the struct of these names is the one.

    Members without a name (a union within) are told without one, and theirs are the record's own.
    """
    wanted = tuple(name for each in fields if (name := each.partition("#")[0]))
    if btf is None or not wanted:
        return (), 0
    for type_id in range(1, len(btf)):
        if btf.kind_of(type_id) != Kind.STRUCT:
            continue
        found = btf.type(type_id)
        if isinstance(found, Struct) and tuple(member.name for member in found.members if member.name) == wanted:
            return btf.layout_of(type_id), found.size_bytes
    return (), 0


def _annotated(name: str, btf: Btf | None) -> tuple[tuple[Field, ...], int]:
    """The layout of a queue's or stack's values, which BCC describes beside it (BPF_ANNOTATE_KV_PAIR_QUEUESTACK)."""
    found = btf.find(f"____btf_map_{name}", Kind.STRUCT) if btf is not None else 0
    if btf is None or not found:
        return (), 0
    value = next((each.type for each in btf.struct(found).members if each.name == "value"), None)
    return (btf.layout_of(value), btf.size_of(value)) if value else ((), 0)


def _struct(name: str, btf: Btf | None) -> tuple[tuple[Field, ...], int]:
    """The layout of the struct of that name."""
    found = btf.find(name, Kind.STRUCT) if btf is not None else 0
    return (btf.layout_of(found), btf.size_of(found)) if btf is not None and found else ((), 0)
