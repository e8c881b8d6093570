"""The verifier's log in, one sentence for people out. Pure.

``libbpf`` and ``syscall.prog_load`` call ``refusal`` when the kernel refuses a program. The kernel names an instruction
and a register; whoever wrote the C wants its line, what is wrong there, and what to write instead. The log carries the
source as comments (``; source text @ file.c:12``; before Linux 6.10 without the place), because clang keeps line info.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from probefleet_agent.errors import VerifierError

_SOURCE = re.compile(r"^; ?(?P<text>.*?)(?: @ (?P<file>[^@]+?):(?P<line>\d+))?$")
_INSTRUCTION = re.compile(r"^(\d+): ")
# Source file and line of an instruction, from the object's .BTF.ext.
LineOf = Callable[[int], tuple[str, int] | None]
# What the kernel prints after its verdict.
_TRAILER = re.compile(
    r"^(processed \d+ insns|verification time|stack depth|peak_states|insns processed|max_states|-- (BEGIN|END)|$)"
)
_STATE = re.compile(
    r"^(R\d+(_\w+)?=|from \d+ to \d+|\d+: R\d|caller:|callee:|func#|mark_precise|last_idx|regs=|parent |"
    r"(cur|old) state:)"
)
_POINTER = re.compile(r"([A-Za-z_]\w*(?:(?:->|\.)\w+|\[[^\]]*\])*?)->\w+(?!\w|->|\s*\()|\*\s*([A-Za-z_]\w*)\b")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Where the verifier stopped and why. ``line`` is 0 and ``file`` "" where the kernel does not say."""

    message: str  # the kernel's own words
    source: str
    file: str
    line: int
    plain: str
    advice: str


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    plain: str | Callable[[re.Match[str], str], str]
    advice: str


def _pointer_in(source: str) -> str:
    """The one pointer that a line follows; the whole line when there are several or none."""
    names = {name for pair in _POINTER.findall(source) for name in pair if name}
    return names.pop() if len(names) == 1 else f"a pointer in `{source}`" if source else "a pointer"


def _rule(pattern: str, plain: str | Callable[[re.Match[str], str], str], advice: str) -> _Rule:
    return _Rule(re.compile(pattern), plain, advice)


_BOUNDS = "Test the index or length against the size just before it is used: `if (i >= N) return 0;`."
_RULES = (
    _rule(
        r"failed to resolve CO-RE relocation (?:<\w+> )?\[\d+\] (?:struct |union |enum )?([\w.:]+)",
        lambda found, _: f"{found[1]} is not in this kernel's types",
        "Guard it with bpf_core_field_exists() or take the field's name on this kernel.",
    ),
    _rule(
        r"invalid mem access '\w*or_null_?'?|possibly NULL pointer passed|null-check it first",
        lambda _, source: f"{_pointer_in(source)} may be null",
        "Test the pointer first.",
    ),
    _rule(
        r"invalid mem access '(?:scalar|inv)'",
        lambda _, source: f"{_pointer_in(source)} is a plain number to the verifier, not memory that it knows",
        "Read through BPF_CORE_READ() or bpf_probe_read_kernel() (bpf_probe_read_user() for the process's memory).",
    ),
    _rule(
        r"combined stack size of \d+ calls? is|stack size .* exceeds|"
        r"invalid .*stack .*off=-(?:5(?:1[3-9]|[2-9]\d)|[6-9]\d\d|\d{4,})",
        "more than 512 bytes of stack",
        "Keep large data in a per-CPU array map of one entry and look that up.",
    ),
    _rule(
        r"invalid (?:indirect )?(?:read from|access to) stack|invalid indirect access to stack",
        "memory on the stack is handed on before all of it was written",
        "Set it to zero first: `struct key key = {};` or __builtin_memset(), padding included.",
    ),
    _rule(
        r"unbounded (?:memory access|min value|variable-offset)|min value is (?:negative|outside)",
        "an index or a length is not bounded",
        _BOUNDS + " Make it unsigned, or mask it: `i &= N - 1`.",
    ),
    _rule(
        r"(?:max value is outside of the (?:allowed memory|array) range|invalid access to (?:map value|memory|map key))"
        r"(?:, value_size=(\d+) off=(-?\d+) size=(\d+))?",
        lambda found, _: (
            "an access can go beyond the end"
            + (f" ({found[3]} bytes at {found[2]} of a value of {found[1]})" if found[1] else "")
        ),
        _BOUNDS,
    ),
    _rule(
        r"BPF program is too large|jumps is too complex|too many (?:states|instructions)|program too large",
        "too many instructions to verify",
        "Give loops a smaller fixed bound, use bpf_loop(), or split the program.",
    ),
    _rule(
        r"infinite loop detected|back-edge from insn|loop is not bounded",
        "a loop has no end that the verifier can see",
        "Give it a constant bound: `for (int i = 0; i < 16; i++)`.",
    ),
    _rule(
        r"(?:program of this type cannot use helper|unknown func|helper access .* not allowed) (\w+)#(\d+)",
        lambda found, _: f"{found[1]}() is not allowed in a program of this type",
        "Use another helper, or attach the function to a kind of target that has it.",
    ),
    _rule(
        r"invalid func (?:unknown#)?(\w+)",
        lambda found, _: f"helper {found[1]} does not exist on this kernel",
        "Test for it with bpf_core_enum_value_exists(), or do without.",
    ),
    _rule(
        r"cannot call GPL[- ]restricted function|from non-GPL compatible program",
        "a helper that it calls is only for programs under the GPL",
        'Add `char LICENSE[] SEC("license") = "GPL";`.',
    ),
    _rule(
        r"Unreleased reference|reference leak|has not been released|would lead to reference leak",
        "a record or reference that was taken is not given back on every way out",
        "Call bpf_ringbuf_submit() or bpf_ringbuf_discard() before each return.",
    ),
    _rule(
        r"BPF_STX uses reserved fields|BPF_ATOMIC uses invalid atomic opcode",
        "an atomic operation whose result is used, or another than adding, is not known to this kernel (Linux 5.12)",
        "Do not use the result of __sync_fetch_and_add(), nor add a constant 0.",
    ),
    _rule(
        r"R(\d+) !read_ok",
        "a variable is read before it is set",
        "Give it a value where it is declared.",
    ),
    _rule(
        r"invalid bpf_context access off=(\d+) size=(\d+)",
        lambda found, _: f"the context has nothing to read at byte {found[1]} ({found[2]} bytes)",
        "Compare the context's struct with the target: the event has other fields, or the program is of another kind.",
    ),
    _rule(
        r"R(\d+) type=(\w+) expected=([\w, ]+)",
        lambda found, _: f"argument {found[1]} of the call is {found[2]}, the helper wants {found[3].strip()}",
        "Pass a pointer to a variable on the stack or into a map's value.",
    ),
    _rule(
        r"pointer arithmetic|math between .* pointer|pointer comparison prohibited",
        "arithmetic on a pointer that the verifier does not allow",
        "Bound the number that is added, and add it to a pointer that was tested.",
    ),
    _rule(
        r"leaks addr into|cannot write into|only read is supported",
        "it writes where this program may only read, or stores a kernel address",
        "Copy the value into a map or a ring record instead.",
    ),
    _rule(
        r"R0 has (?:value|unknown scalar)|At program exit the register R0",
        "it returns a value that programs of this kind may not return",
        "End with `return 0;`.",
    ),
)


def read(log: str, line_of: LineOf | None = None) -> Refusal:
    """What a log says. ``line_of`` (from the object's line info) helps where the kernel gives no line numbers."""
    said, source, file, line = _last_words(log)
    if not line and line_of and (place := line_of(_last_instruction(log))):
        file, line = place
    for rule in _RULES:
        found = rule.pattern.search(said) or rule.pattern.search(log[-2000:] if "CO-RE" in rule.pattern.pattern else "")
        if found:
            plain = rule.plain if isinstance(rule.plain, str) else rule.plain(found, source)
            return Refusal(said, source, file, line, plain, rule.advice)
    return Refusal(said, source, file, line, said or "the kernel gave no reason", "")


def has_instructions(log: str) -> bool:
    """The verifier came as far as the program itself."""
    return any(_INSTRUCTION.match(line) for line in log.splitlines())


def _last_words(log: str) -> tuple[str, str, str, int]:
    """The verdict (the lines between the last instruction and the statistics) and the source line before it."""
    rows = [row.rstrip() for row in log.splitlines()]
    last = len(rows) - 1
    while last >= 0 and _TRAILER.match(rows[last]):
        last -= 1
    # The verdict can be several lines, with the registers' states between and behind them.
    verdict: list[str] = []
    while last >= 0 and not (_INSTRUCTION.match(rows[last]) or rows[last].startswith(";")):
        if not _STATE.match(rows[last]):
            verdict.insert(0, rows[last])
        last -= 1
    said = "; ".join(verdict[-4:])
    for at in range(last, -1, -1):
        found = _SOURCE.match(rows[at]) if rows[at].startswith(";") else None
        if found and found["text"].strip():  # code that the compiler made up has no text
            return said, found["text"].strip(), found["file"] or "", int(found["line"] or 0)
    return said, "", "", 0


def _last_instruction(log: str) -> int:
    found = [int(match[1]) for match in map(_INSTRUCTION.match, log.splitlines()) if match]
    return found[-1] if found else 0


def refusal(log: str, program: str, line_of: LineOf | None = None) -> VerifierError:
    """The error to raise: ``verifier refused on_send at line 12: sk->x may be null. Test the pointer first.``"""
    told = read(log, line_of)
    place = f" at line {told.line}" if told.line else f" at `{told.source}`" if told.source else ""
    summary = f"verifier refused {program}{place}: {told.plain}." + (f" {told.advice}" if told.advice else "")
    return VerifierError(summary, log, program)
