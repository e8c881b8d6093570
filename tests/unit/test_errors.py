"""Errors say what, where, why and what to do; the verifier's logs, as several kernels write them, become sentences."""

from __future__ import annotations

import errno

import pytest
from probefleet_agent import errors
from probefleet_agent.kernel import verifier_log

# Linux 6.10 and later name file and line; older ones only quote the source.
NEW = """func#0 @0
0: R1=ctx() R10=fp0
; u64 *v = bpf_map_lookup_elem(&h, &k); @ probe.bpf.c:11
5: (85) call bpf_map_lookup_elem#1    ; R0=map_value_or_null(id=1,map=h,ks=4,vs=8)
; *v += 1; @ probe.bpf.c:12
6: (79) r1 = *(u64 *)(r0 +0)
R0 invalid mem access 'map_value_or_null'
processed 7 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""
OLD = NEW.replace(" @ probe.bpf.c:11", "").replace(" @ probe.bpf.c:12", "")
VERDICTS = [
    ("R6 unbounded memory access, make sure to bounds check any such access", "an index or a length is not bounded"),
    ("R2 min value is negative, either use unsigned or 'var &= const'", "an index or a length is not bounded"),
    (
        "invalid access to map value, value_size=128 off=128 size=8\n"
        "R6 max value is outside of the allowed memory range",
        "an access can go beyond the end (8 bytes at 128 of a value of 128)",
    ),
    ("combined stack size of 2 calls is 544. Too large", "more than 512 bytes of stack"),
    ("invalid write to stack R10 off=-520 size=8", "more than 512 bytes of stack"),
    ("invalid indirect read from stack R2 off -16+4 size 16", "memory on the stack is handed on before all of it"),
    ("BPF program is too large. Processed 1000001 insn", "too many instructions to verify"),
    ("The sequence of 8193 jumps is too complex.", "too many instructions to verify"),
    ("back-edge from insn 9 to 4", "a loop has no end that the verifier can see"),
    ("infinite loop detected at insn 7\ncur state: R0=scalar()\nold state: R0=scalar()", "a loop has no end"),
    ("program of this type cannot use helper bpf_get_stack#67", "bpf_get_stack() is not allowed in a program of this"),
    ("unknown func bpf_xdp_adjust_head#44", "bpf_xdp_adjust_head() is not allowed in a program of this type"),
    ("cannot call GPL-restricted function from non-GPL compatible program", "only for programs under the GPL"),
    ("Unreleased reference id=2 alloc_insn=4", "a record or reference that was taken is not given back"),
    ("BPF_STX uses reserved fields", "an atomic operation whose result is used"),
    ("R3 !read_ok", "a variable is read before it is set"),
    ("invalid bpf_context access off=104 size=8", "the context has nothing to read at byte 104 (8 bytes)"),
    ("R2 type=scalar expected=fp, pkt, map_key", "argument 2 of the call is scalar, the helper wants fp, pkt"),
    ("R1 type=inv expected=fp", "argument 1 of the call is inv"),
    ("R1 pointer arithmetic on map_value_or_null prohibited, null-check it first", "v may be null"),
    ("R1 pointer arithmetic on ctx prohibited", "arithmetic on a pointer"),
    ("R0 invalid mem access 'inv'", "is a plain number to the verifier"),
    ("At program exit the register R0 has value (0x5; 0x0) should have been in (0x0; 0x0)", "it returns a value"),
]


def test_a_refusal_names_the_line() -> None:
    error = verifier_log.refusal(NEW, "on_send")
    assert str(error) == "verifier refused on_send at line 12: v may be null. Test the pointer first."
    assert (error.program, error.log, error.instructions) == ("on_send", NEW, 7)


def test_where_the_kernel_gives_no_line_the_objects_line_info_does() -> None:
    asked = []

    def line_of(instruction: int) -> tuple[str, int]:
        asked.append(instruction)
        return "probe.bpf.c", 12

    assert "on_send at line 12: v may be null" in str(verifier_log.refusal(OLD, "on_send", line_of))
    assert asked == [6], "the last instruction that was verified"


def test_without_any_lines_the_source_is_quoted() -> None:
    assert "on_send at `*v += 1;`: v may be null" in str(verifier_log.refusal(OLD, "on_send"))
    assert "on_send at `*v += 1;`" in str(verifier_log.refusal(OLD, "on_send", lambda _: None))


@pytest.mark.parametrize(("verdict", "plain"), VERDICTS, ids=[plain[:30] for _, plain in VERDICTS])
def test_the_usual_refusals_are_said_plainly_and_with_advice(verdict: str, plain: str) -> None:
    log = NEW.replace("R0 invalid mem access 'map_value_or_null'", verdict)
    told = verifier_log.read(log)
    assert plain in told.plain
    assert told.advice
    assert told.line == 12


@pytest.mark.parametrize(
    ("source", "pointer"),
    [
        ("*v += 1;", "v"),
        ("v->total++;", "v"),
        ("x = sk->peer->port;", "sk->peer"),
        ("total += rows[i].next->size;", "rows[i].next"),
        ("a->x = b->y;", "a pointer in `a->x = b->y;`"),
        ("return f(x);", "a pointer in `return f(x);`"),
    ],
)
def test_the_pointer_that_may_be_null_is_named_where_the_line_has_but_one(source: str, pointer: str) -> None:
    log = NEW.replace("*v += 1;", source)
    assert verifier_log.read(log).plain == f"{pointer} may be null"


def test_a_field_that_the_kernel_lacks_is_named() -> None:
    log = (
        "0: R1=ctx() R10=fp0\n; return BPF_CORE_READ(task, nope); @ p.c:9\n1: <invalid CO-RE relocation>\n"
        "failed to resolve CO-RE relocation <byte_off> [12] struct task_struct.nope (0:0 @ offset 0)\n"
        "processed 2 insns (limit 1000000)\n"
    )
    assert verifier_log.read(log).plain == "task_struct.nope is not in this kernel's types"


def test_an_unknown_verdict_is_passed_on_in_the_kernels_words() -> None:
    log = NEW.replace("R0 invalid mem access 'map_value_or_null'", "something quite new")
    assert str(verifier_log.refusal(log, "p")) == "verifier refused p at line 12: something quite new."


def test_code_that_the_compiler_made_up_does_not_hide_the_line() -> None:
    log = NEW.replace("6: (79)", ";  @ probe.bpf.c:0\n6: (79)")
    assert verifier_log.read(log).line == 12


@pytest.mark.parametrize("log", ["", "\n\n", "processed 0 insns\n", "; ", "0: ", "\x00\xff", "R0=1\n" * 20])
def test_any_text_makes_a_sentence(log: str) -> None:
    assert str(verifier_log.refusal(log, "p")).startswith("verifier refused p")


def test_the_tail_is_the_last_whole_lines_in_four_kibibytes() -> None:
    log = "".join(f"{number}: (b7) r0 = {number}\n" for number in range(997)) + "ü" * 10 + "\nR0 !read_ok\n"
    tail = verifier_log.refusal(log, "p").tail
    assert len(tail.encode()) <= 4096 and log.endswith(tail) and tail[0].isdigit()
    assert errors.VerifierError("s", "short", "p").tail == "short"
    assert errors.VerifierError("s", "short", "p").instructions == 0


def test_a_system_calls_failure_says_what_and_what_to_do() -> None:
    error = errors.KernelError(errno.EPERM, "create map x", "Run as root.")
    assert str(error) == "create map x: Operation not permitted (EPERM). Run as root."
    assert (error.errno, error.what, error.advice, error.reason) == (
        errno.EPERM, "create map x", "Run as root.", "NotPermitted",
    )  # fmt: skip
    assert errors.KernelError(errno.EINVAL, "x").reason == "KernelRefused"
    assert str(errors.KernelError(524, "x")) == "x: Unknown error 524 (524)"


def test_a_missing_target_names_those_near() -> None:
    error = errors.NoSuchTarget("tracepoint syscalls:sys_enter_exeve", ("sys_enter_execve", "sys_enter_execveat"))
    assert str(error) == (
        "no tracepoint syscalls:sys_enter_exeve on this kernel; near: sys_enter_execve, sys_enter_execveat"
    )
    inlined = errors.NoSuchTarget("function tcp_x", ("tcp_x.isra.0",), "inlined")
    assert str(inlined) == (
        "no function tcp_x on this kernel; inlined: the compiler left no function of that name to attach to; "
        "near: tcp_x.isra.0"
    )
    assert str(errors.NoSuchTarget("file /x", where="on this node")) == "no file /x on this node"


def test_a_missing_feature_names_its_release() -> None:
    error = errors.UnsupportedFeature("ring buffers", "5.8", "it is 5.4")
    assert str(error) == "this kernel has no ring buffers (needs Linux 5.8 or later): it is 5.4"
    assert str(errors.UnsupportedFeature("kprobes")) == "this kernel has no kprobes"


def test_every_error_has_a_word_for_the_status() -> None:
    found = [errors.ProbefleetError]
    for kind in found:
        found += kind.__subclasses__()
        assert kind.reason.isalpha() and kind.reason[0].isupper()
    assert len(found) >= 8
    assert errors.BudgetExceeded("m", reason="MapTooLarge").reason == "MapTooLarge"
