"""What is done to a BCC program's text before it is compiled, and what its functions' names say. Pure.

BCC finds kernel headers and tracepoints' formats by itself, on a machine that has them. The sandboxed child has neither
(no headers exist on the node, tracefs is root's), so ``bcc.compile`` gives it what the text asks for:

- every kernel header that it includes, as another name of vmlinux.h (``wrappers``);
- the struct of every tracepoint that it names, from the format that the kernel shows (``tracepoint_struct``);
- for ``#include <probefleet.h>`` the pod filter, on that same line: BCC rewrites map operations in the main file only,
  and lines keep their numbers;
- the number of each line: BCC's own rewriting moves them (``numbered``);
- for ``bpf_trace_printk`` a ring of the program's own, and the functions that fill it (probefleet_bcc_print.h);
- for ``bpf_usdt_readarg`` the maps of libbpf's usdt.bpf.h, which ``links_usdt`` fills: BCC itself would have to know
  the traced file when it compiles, and where each process has it;
- global objects of the structs that records may be made of, behind the last line: else BTF would not describe them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ProgramKind = Literal[
    "kprobe", "kretprobe", "tracepoint", "raw_tracepoint", "fentry", "fexit", "lsm", "iterator", "syscall", ""
]
_PREFIXES: tuple[tuple[str, ProgramKind], ...] = (
    ("kprobe__", "kprobe"),
    ("kretprobe__", "kretprobe"),
    ("tracepoint__", "tracepoint"),
    ("raw_tracepoint__", "raw_tracepoint"),
    ("kfunc__", "fentry"),
    ("kretfunc__", "fexit"),
    ("lsm__", "lsm"),
    ("bpf_iter__", "iterator"),
    ("syscall__", "syscall"),
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([A-Za-z0-9_][A-Za-z0-9_/.-]*\.h)[>"]', re.MULTILINE)
_OURS = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]probefleet\.h[>"][^\n]*', re.MULTILINE)
_ENDPOINTS_HEADER = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]probefleet_endpoints\.h[>"][^\n]*', re.MULTILINE)
_TRACEPOINT = re.compile(r"\bTRACEPOINT_PROBE\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)|\bstruct\s+tracepoint__(\w+?)__(\w+)\b")
_STRUCT = re.compile(r"\b(struct|union)\s+(\w+)\s*\{")
_TYPEDEF = re.compile(r"\btypedef\s+(?:struct|union)\s*\w*\s*\{[^{}]*\}\s*(\w+)\s*;")
_RECORDS = re.compile(r"\bBPF_(?:PERF_OUTPUT|RINGBUF_OUTPUT)\b")
_FIELD = re.compile(
    r"\s*field:(?P<declaration>[^;]+);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);\s*signed:(?P<signed>\d);"
)
_ARRAY = re.compile(r"(?P<type>.*?)\b(?P<name>\w+)\[(?P<count>[^\]]*)\]\Z")
_ENDED = re.compile(r"[;{}]\s*(?://[^\\]*|/\*[^*]*\*/\s*)?\Z")
_FIRST = "#line 1\n"
#: What a program's source is called inside; BCC's own lines have another name.
FILE = "/virtual/policy.c"
MAX_NAMES = 64
KEEP = "__probefleet_keep_"
_ELEMENT_BYTES = {
    "char": 1, "unsigned char": 1, "signed char": 1, "u8": 1, "__u8": 1, "s8": 1, "short": 2, "unsigned short": 2,
    "u16": 2, "__u16": 2, "__be16": 2, "int": 4, "unsigned int": 4, "u32": 4, "__u32": 4, "__be32": 4, "long": 8,
    "unsigned long": 8, "u64": 8, "__u64": 8,
}  # fmt: skip
_FILTER = (
    'BPF_F_TABLE("hash", u64, u8, probefleet_filter, 16384, 0); '
    'BPF_TABLE("percpu_array", u32, u64, probefleet_lost, PROBEFLEET_COUNTS); '
    "static inline bool probefleet_selected(u64 cgroup_id) { u8 *verdict = probefleet_filter.lookup(&cgroup_id); "
    "return !verdict || *verdict != PROBEFLEET_REFUSED; } "
    "static inline bool probefleet_selected_process(u32 tgid) "
    "{ return !PROBEFLEET_TGID || tgid == PROBEFLEET_TGID; } "
    "static inline void probefleet_count_lost(u32 what) { u64 *count = probefleet_lost.lookup(&what); "
    "if (count) __sync_fetch_and_add(count, 1); }"
)
_ENDPOINTS = (
    'BPF_F_TABLE("hash", struct probefleet_address, u64, probefleet_endpoints, 65536, BPF_F_NO_PREALLOC); '
    "static inline endpoint_t probefleet_endpoint(const u8 *address) { struct probefleet_address key; "
    "__builtin_memcpy(&key, address, sizeof(key)); u64 *found = probefleet_endpoints.lookup(&key); "
    "return found ? *found : 0; } "
    "static inline endpoint_t probefleet_endpoint4(ipv4_t address) { ip_t mapped = { [10] = 0xff, [11] = 0xff }; "
    "__builtin_memcpy(mapped + 12, &address, sizeof(address)); return probefleet_endpoint(mapped); }"
)
PRINT_RING, PRINT_RECORD = "trace_printk", "probefleet_print"
_PRINT = re.compile(r"\bbpf_trace_printk\s*\(")
# Strings are read as %s does it: the kernel's or the user's. The first bytes are kept as they are, for %pI4 and %pI6.
_PRINTS = (
    f"BPF_RINGBUF_OUTPUT({PRINT_RING}, 128); "
    "static inline struct probefleet_print *probefleet_print_begin(const char *format) { "
    "u64 cgroup = bpf_get_current_cgroup_id(), id = bpf_get_current_pid_tgid(), flags = 0; "
    "struct task_struct *task = (struct task_struct *)bpf_get_current_task(); struct probefleet_print *line; "
    "if (!probefleet_selected(cgroup)) return 0; "
    f"line = {PRINT_RING}.ringbuf_reserve(sizeof(struct probefleet_print)); "
    "if (!line) { probefleet_count_lost(PROBEFLEET_LOST_RING); return 0; } "
    "bpf_probe_read_kernel(&flags, sizeof(long), (void *)&task->thread_info.flags); "
    "line->cgroup = cgroup; line->time = bpf_ktime_get_ns(); line->pid = id; line->tgid = id >> 32; "
    "line->cpu = bpf_get_smp_processor_id(); line->flags = !!(flags & PROBEFLEET_NEED_RESCHED); line->pointers = 0; "
    "bpf_get_current_comm(&line->task, sizeof(line->task)); "
    "bpf_probe_read_kernel_str(&line->format, sizeof(line->format), format); return line; } "
    "static inline void probefleet_print_text(struct probefleet_print *line, u32 place, u64 pointer) { "
    "char *text = &line->texts[place * PROBEFLEET_PRINT_TEXT]; bpf_probe_read(text, 16, (void *)pointer); "
    "if (bpf_probe_read_str(text, PROBEFLEET_PRINT_TEXT, (void *)pointer) < 0) text[0] = 0; } "
    "static inline void probefleet_print_end(struct probefleet_print *line) { "
    f"{PRINT_RING}.ringbuf_submit(line, 0); probefleet_count_lost(PROBEFLEET_SUBMITTED); }}"
)
_USDT = re.compile(r"\bbpf_usdt_readarg(?:_p)?\s*\(")
#: Names and members are usdt.bpf.h's; so is what the function does. BCC counts arguments from 1.
_USDT_ARGUMENTS = """\
struct __bpf_usdt_arg_spec { u64 val_off; u32 arg_type; short reg_off; bool arg_signed; char arg_bitshift; };
struct __bpf_usdt_spec { struct __bpf_usdt_arg_spec args[12]; u64 usdt_cookie; short arg_cnt; };
BPF_ARRAY(__bpf_usdt_specs, struct __bpf_usdt_spec, 256);
#ifndef PROBEFLEET_COOKIES
BPF_HASH(__bpf_usdt_ip_to_spec_id, u64, u32, 1024);
#endif
static inline int probefleet_usdt_argument(struct pt_regs *registers, u32 number, void *result, u32 bytes)
{
    struct __bpf_usdt_arg_spec *argument;
    struct __bpf_usdt_spec *found;
    u64 value = 0;
#ifdef PROBEFLEET_COOKIES
    u32 place = bpf_get_attach_cookie(registers);
#else
    u64 address = 0;
    u32 *at, place;
    bpf_probe_read_kernel(&address, sizeof(address), &PT_REGS_IP(registers));
    at = __bpf_usdt_ip_to_spec_id.lookup(&address);
    if (!at)
        return -3;
    place = *at;
#endif
    found = __bpf_usdt_specs.lookup(&place);
    if (!found || number >= 12 || number >= found->arg_cnt)
        return -2;
    argument = &found->args[number];
    if (argument->arg_type == 0)
        value = argument->val_off;
    else if (bpf_probe_read_kernel(&value, sizeof(value), (void *)registers + argument->reg_off))
        return -14;
    if (argument->arg_type == 2 && bpf_probe_read_user(&value, sizeof(value), (void *)value + argument->val_off))
        return -14;
    value <<= argument->arg_bitshift;
    value = argument->arg_signed ? (u64)((s64)value >> argument->arg_bitshift) : value >> argument->arg_bitshift;
    __builtin_memcpy(result, &value, bytes < sizeof(value) ? bytes : sizeof(value));
    return 0;
}
#define bpf_usdt_readarg(number, registers, result) \\
    probefleet_usdt_argument(registers, (number) - 1, result, sizeof(*(result)))
#define bpf_usdt_readarg_p(number, registers, result, bytes) \\
    ({ u64 __from = 0; probefleet_usdt_argument(registers, (number) - 1, &__from, sizeof(__from)) ?: \\
       bpf_probe_read_user(result, bytes, (void *)__from); })"""


@dataclass(frozen=True, slots=True)
class Hint:
    """What a function's name says about where it goes; ``kind`` is "" where it says nothing."""

    kind: ProgramKind
    target: str = ""  #: function, tracepoint's name, or system call
    category: str = ""  #: of a tracepoint


def hint_of(function: str) -> Hint:
    """``tracepoint__syscalls__sys_enter_execve`` → tracepoint syscalls:sys_enter_execve; names without prefix: "".

    TRACEPOINT_PROBE, RAW_TRACEPOINT_PROBE, KFUNC_PROBE and LSM_PROBE are macros that make such names.
    """
    for prefix, kind in _PREFIXES:
        if not function.startswith(prefix):
            continue
        rest = function.removeprefix(prefix)
        if kind == "tracepoint":
            category, _, name = rest.partition("__")
            return Hint(kind, name, category) if name else Hint("")
        if kind in ("fentry", "fexit"):
            rest = rest.partition("__")[2] or rest  # kfunc__vmlinux__do_unlinkat
        return Hint(kind, rest) if rest else Hint("")
    return Hint("")


def reads_registers(source: str, function: str) -> bool:
    """The function's context is ``struct pt_regs``: it is written for a kprobe, whatever its name says."""
    bare = _COMMENT.sub(" ", source)
    return bool(re.search(rf"\b{re.escape(function)}\s*\(\s*(?:const\s+)?struct\s+pt_regs\b", bare))


def takes_a_context(source: str, function: str) -> bool:
    """The function has one parameter, a pointer: it can be a program."""
    bare = _COMMENT.sub(" ", source)
    kind = r"(?:const\s+)?(?:void|struct\s+\w+)\s*\*"
    return bool(re.search(rf"\b{re.escape(function)}\s*\(\s*{kind}\s*\w+\s*\)", bare))


def wrappers(source: str) -> tuple[str, ...]:
    """The kernel headers that the text includes by name, such as ``linux/sched.h``; BCC has its own ``bcc/``."""
    names = dict.fromkeys(_INCLUDE.findall(source))
    return tuple(name for name in names if ".." not in name and not name.startswith("bcc/"))[:MAX_NAMES]


def includes_ours(source: str) -> bool:
    """The text includes ``probefleet.h``, or ``probefleet_endpoints.h``, which brings it."""
    return bool(_OURS.search(source) or _ENDPOINTS_HEADER.search(source))


def prints(source: str) -> bool:
    """The text calls ``bpf_trace_printk``."""
    return bool(_PRINT.search(_COMMENT.sub(" ", source)))


def reads_usdt(source: str) -> bool:
    """The text calls ``bpf_usdt_readarg``: it wants the arguments of a static probe."""
    return bool(_USDT.search(_COMMENT.sub(" ", source)))


def structs(source: str) -> tuple[str, ...]:
    """The structs and unions that the text defines by name."""
    return tuple(dict.fromkeys(name for _, name in _STRUCT.findall(_COMMENT.sub(" ", source))))


def prologue(source: str, renamed: Sequence[str] = ()) -> str:
    """What stands before ``prepared``'s first line: a text that prints may have no line to put the functions into.

    ``renamed`` are structs of the text's own that would be second definitions of the kernel's: they get other names.
    """
    lines = [f"#define {name} {name}__own" for name in renamed]
    if prints(source) and not includes_ours(source):
        lines.append(f"{_FILTER} {_PRINTS}")
    if reads_usdt(source):
        lines.append(_USDT_ARGUMENTS)
    return "\n".join([*lines, "#line 1\n"]) if lines else ""


def tracepoints(source: str) -> tuple[tuple[str, str], ...]:
    """(category, name) of every tracepoint whose arguments the text uses."""
    found = _TRACEPOINT.findall(_COMMENT.sub(" ", source))
    return tuple(dict.fromkeys((a or c, b or d) for a, b, c, d in found))[:MAX_NAMES]


def prepared(source: str, *, keep: bool = True, leave: frozenset[int] = frozenset()) -> str:
    """The text that is compiled; every line of the source keeps its number. ``leave``: objects not kept, by number."""
    bare = _COMMENT.sub(" ", source)
    printing = prints(source)
    functions = f"{_FILTER} {_PRINTS}" if printing else _FILTER
    text = _OURS.sub(lambda _: functions, source, count=1)
    brought = f"{functions} {_ENDPOINTS}" if text == source else _ENDPOINTS
    text = _ENDPOINTS_HEADER.sub(lambda _: brought, text, count=1)
    if not keep or not (printing or _RECORDS.search(bare)):
        return text
    names = [f"struct {PRINT_RECORD}"] if printing else []
    names += [f"{word} {name}" for word, name in _STRUCT.findall(bare)] + _TYPEDEF.findall(bare)
    section = '__attribute__((section(".maps.probefleet_keep"), used))'
    numbers = enumerate(dict.fromkeys(names[:MAX_NAMES]))
    kept = [f"{name} {KEEP}{index} {section};" for index, name in numbers if index not in leave]
    return text + "\n" + "\n".join(kept) + "\n"


def not_kept(errors: str) -> frozenset[int]:
    """Which objects the compiler complains of: their structs are left out by the preprocessor."""
    return frozenset(int(number) for number in re.findall(rf"\b{KEEP}(\d+)\b", errors))


def numbered(text: str) -> str:
    """The same with `#line` before each statement: BCC puts lines of its own before the text and into functions.

    Only behind a line that ends a statement or opens a block: within a macro's arguments there may be no directive, and
    behind a backslash it would be no directive. What stands before the text's own `#line 1` is not the author's.
    """
    before, _, source = text.rpartition(_FIRST)
    lines = [f'{before}#line 1 "{FILE}"']
    for number, line in enumerate(source.split("\n"), start=1):
        lines.append(line)
        if _ENDED.search(line):
            lines.append(f"#line {number + 1}")
    return "\n".join(lines)


def written(source: str) -> list[str]:
    """The author's own lines."""
    return source.rpartition(_FIRST)[2].split("\n")


def tracepoint_struct(category: str, name: str, text: str) -> str:
    """``struct tracepoint__CATEGORY__NAME`` from the text of a tracepoint's ``format`` file, every offset forced.

    Members are called as BCC calls them: ``args->filename``, and ``data_loc_NAME`` for what lies behind the record.
    """
    parts, at = [], 0
    for match in _FIELD.finditer(text):
        offset, size = int(match["offset"]), int(match["size"])
        declared = _declaration(match["declaration"].strip(), size, match["signed"] == "1")
        if offset < at or not size or declared is None:
            continue
        if offset > at:
            parts.append(f"char __pad{at}[{offset - at}];")
        parts.append(declared)
        at = offset + size
    body = "\n\t".join(parts)
    return f"struct tracepoint__{category}__{name} {{\n\t{body}\n}} __attribute__((packed, aligned(8)));\n"


def _declaration(text: str, size: int, signed: bool) -> str | None:
    if text.startswith(("__data_loc ", "__rel_loc ")):
        name = text.rpartition(" ")[2].partition("[")[0]
        return f"int data_loc_{name};" if size == 4 else None
    array = _ARRAY.match(text)
    if array:
        kind = array["type"].strip().removeprefix("const ")
        element = _ELEMENT_BYTES.get(kind, 0)
        if element and size % element == 0:
            return f"{kind} {array['name']}[{size // element}];"
        return f"unsigned char {array['name']}[{size}];"
    kind, _, name = text.rpartition(" ")
    if kind.endswith("*") or name.startswith("*"):
        name = name.lstrip("*")
        return f"{'char' if 'char' in kind else 'void'} *{name};" if size == 8 else None
    number = {1: "8", 2: "16", 4: "32", 8: "64"}.get(size)
    return f"{'s' if signed else 'u'}{number} {name};" if number else f"unsigned char {name}[{size}];"
