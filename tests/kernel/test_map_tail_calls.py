"""``tailCalls``: programs that jump to others by number, changed while they run, as far as the kernel goes."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import os
from typing import Any

import pytest
import yaml
from probefleet_agent.kernel import syscall
from probefleet_cli import preparation
from probefleet_cli.failures import BadInput

from tests.kernel import policies
from tests.kernel.support import call_getppid

# By the number of the system call: 300 slots, and a way out for those that lead nowhere.
BY_NUMBER = """
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 300); __uint(key_size, 4); __uint(value_size, 4); }
by_number SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 4); __type(key, u32); __type(value, u64); }
counts SEC(".maps");
static __always_inline int count(u32 key)
{
	probefleet_add(&counts, &key, 1);
	return 0;
}
SEC("raw_tp/sys_enter")
int dispatch(struct bpf_raw_tracepoint_args *ctx)
{
	if (!ours())
		return 0;
	bpf_tail_call(ctx, &by_number, ctx->args[1]);
	return count(0);
}
SEC("raw_tp") int on_parent(void *ctx) { return count(1); }
SEC("raw_tp") int on_priority(void *ctx) { return count(2); }
SEC("raw_tp") int ignored(void *ctx) { return 0; }
"""
GETPPID, GET_PRIORITY_MAX, GETUID = 110, 146, 102
OUTPUTS = {
    "outputs": [{"name": "calls", "from": {"map": "counts"}, "topk": {}, "groupBy": ["key"]}],
    "interval": "1s",
}


def policy(entries: dict[Any, str], source: str = BY_NUMBER, **more: Any) -> dict[str, Any]:
    return policies.c_policy(source, tailCalls=[{"map": "by_number", "entries": entries}], **OUTPUTS, **more)


def calls(run: policies.Run) -> dict[str, int]:
    """Without the calls that lead nowhere: Python makes those of its own."""
    return {key: value for (key,), value in run.rows("calls").items() if key != "0" and value}


def priority_max(times: int) -> None:
    for _ in range(times):
        os.sched_get_priority_max(os.SCHED_OTHER)


@pytest.mark.shows("map/prog-array")
def test_every_slot_leads_to_its_program_and_an_edit_goes_on_counting() -> None:
    with policies.run(policy({GETPPID: "on_parent", str(GET_PRIORITY_MAX): "on_priority"})) as run:
        call_getppid(997)
        priority_max(23)
        assert calls(run) == {"1": 997, "2": 23}
        run.apply(policy({GETPPID: "on_priority", GET_PRIORITY_MAX: "ignored"}))
        call_getppid(5)
        priority_max(7)
        assert calls(run) == {"1": 997, "2": 28}
        run.apply(policy({}))
        call_getppid(997)
        priority_max(997)
        assert calls(run) == {"1": 997, "2": 28}, "empty slots fall through"


def test_what_leads_nowhere_falls_through() -> None:
    with policies.run(policy({GETPPID: "on_parent"})) as run:
        before = run.rows("calls")[("0",)]
        libc = ctypes.CDLL(None)
        for _ in range(997):
            libc.syscall(GETUID)
        assert run.rows("calls")[("0",)] - before >= 997
        assert calls(run) == {}


def test_slots_are_pinned_with_the_instance() -> None:
    """A program array empties itself when nobody holds it: the pin does."""
    with policies.run(policy({GETPPID: "on_parent"})):
        (pin,) = policies.folder().glob("probefleet/instances/*/map_by_number")
        with syscall.obj_get(str(pin)) as fd:
            program = syscall.map_lookup(fd, GETPPID.to_bytes(4, "little"), 4)
            assert program is not None and int.from_bytes(program, "little") > 0
            assert syscall.map_lookup(fd, bytes(4), 4) is None


def test_the_source_can_fill_its_slots_itself() -> None:
    source = BY_NUMBER.replace(
        """__uint(value_size, 4); }
by_number SEC(".maps");""",
        """__array(values, int (void *)); }
by_number SEC(".maps") = { .values = { [110] = (void *)&on_parent } };""",
    )
    source = "int on_parent(void *ctx);\n" + source
    with policies.run(policies.c_policy(source.replace('SEC("raw_tp") int', 'SEC("?raw_tp") int'), **OUTPUTS)) as run:
        call_getppid(997)
        assert calls(run) == {"1": 997}


# Each program jumps to itself until the kernel lets it fall through.
CHAIN = """
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 1); __uint(key_size, 4); __uint(value_size, 4); }
by_number SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 4); __type(key, u32); __type(value, u64); }
counts SEC(".maps");
static __always_inline void count(u32 key) { probefleet_add(&counts, &key, 1); }
SEC("raw_tp") int again(void *ctx)
{
	count(1);
	bpf_tail_call(ctx, &by_number, 0);
	count(2);
	return 0;
}
SEC("raw_tp/sys_enter")
int first(struct bpf_raw_tracepoint_args *ctx)
{
	if (ours() && ctx->args[1] == 110)
		bpf_tail_call(ctx, &by_number, 0);
	return 0;
}
"""


def test_a_chain_ends_at_the_kernels_limit() -> None:
    with policies.run(policy({0: "again"}, CHAIN)) as run:
        call_getppid(23)
        assert calls(run) == {"1": 33 * 23, "2": 23}, "33 jumps an event; then the last one goes on behind its own"


def test_programs_of_a_compiled_object_fill_the_slots_and_change_live() -> None:
    text = policies.HEAD.replace("PID", str(os.getpid())) + BY_NUMBER
    data = preparation.compile_source(text, "by-number.bpf.c")
    program = {"object": {"sha256": hashlib.sha256(data).hexdigest(), "inline": base64.b64encode(data).decode()}}

    def by_object(entries: dict[Any, str]) -> dict[str, Any]:
        made = policy(entries)
        made["spec"]["program"] = program
        return made

    with policies.run(by_object({GETPPID: "on_parent", GET_PRIORITY_MAX: "on_priority"})) as run:
        call_getppid(997)
        priority_max(23)
        assert calls(run) == {"1": 997, "2": 23}
        run.apply(by_object({GETPPID: "on_priority", GET_PRIORITY_MAX: "ignored"}))
        call_getppid(5)
        priority_max(7)
        assert calls(run) == {"1": 997, "2": 28}


BCC = f"""
BPF_PROG_ARRAY(by_number, 300);
BPF_ARRAY(counts, u64, 4);
static inline int count(int key) {{ counts.atomic_increment(key); return 0; }}
RAW_TRACEPOINT_PROBE(sys_enter)
{{
    if (bpf_get_current_pid_tgid() >> 32 != {os.getpid()})
        return 0;
    by_number.call(ctx, ctx->args[1]);
    return count(0);
}}
int no_program(int number) {{ return *(int *)(long)number; }}
int on_parent(void *ctx) {{ return count(1); }}
int on_priority(void *ctx) {{ return count(2); }}
int ignored(void *ctx) {{ return 0; }}
"""


def by_bcc(entries: dict[Any, str]) -> dict[str, Any]:
    made = policy(entries)
    made["spec"]["program"] = {"bcc": {"source": BCC}}
    return made


def test_programs_of_bcc_fill_the_slots_and_change_live() -> None:
    with policies.run(by_bcc({GETPPID: "on_parent", GET_PRIORITY_MAX: "on_priority"})) as run:
        before = [path.name for path in policies.folder().glob("probefleet/instances/*")]
        call_getppid(997)
        priority_max(23)
        assert calls(run) == {"1": 997, "2": 23}
        run.apply(by_bcc({GETPPID: "on_priority", GET_PRIORITY_MAX: "ignored"}))
        call_getppid(5)
        priority_max(7)
        assert calls(run) == {"1": 997, "2": 28}
        run.apply(by_bcc({}))
        call_getppid(997)
        assert calls(run) == {"1": 997, "2": 28}, "empty slots fall through"
        assert [path.name for path in policies.folder().glob("probefleet/instances/*")] == before


def test_a_function_of_bcc_that_is_of_another_type_keeps_none_from_running() -> None:
    """It could be named by an edit, for it takes a context; but the one that jumps has another."""
    wanted = by_bcc({GETPPID: "on_parent"})
    wanted["spec"]["program"]["bcc"]["source"] += "int on_probe(struct pt_regs *ctx) { return PT_REGS_SP(ctx) == 0; }\n"
    with policies.run(wanted) as run:
        call_getppid(23)
        assert calls(run) == {"1": 23}
        named = yaml.safe_load(yaml.safe_dump(wanted))
        named["spec"]["tailCalls"][0]["entries"][GET_PRIORITY_MAX] = "on_probe"
        with pytest.raises(AssertionError, match=r"BadObject: .*on_probe"):
            run.apply(named)
        call_getppid(5)
        assert calls(run) == {"1": 28}, "it goes on with the slots that it had"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({300: "on_parent"}, r"entries.300: 300: by_number has 300 slots"),
        ({1: "on_parents"}, r'entries.1: "on_parents": the source has no function of that name'),
    ],
)
def test_wrong_slots_of_bcc_are_named(entries: dict[Any, str], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        policies.prepare(by_bcc(entries))
    with pytest.raises(BadInput, match=r'"counts": the text has no BPF_PROG_ARRAY of that name. Known: by_number'):
        wrong = by_bcc({})
        wrong["spec"]["tailCalls"] = [{"map": "counts", "entries": {1: "on_parent"}}]
        policies.prepare(wrong)


def chained(programs: int) -> dict[str, Any]:
    """Each slot's program counts itself and jumps to the next; the last one's slot leads nowhere."""
    source = CHAIN[: CHAIN.index('SEC("raw_tp") int again')].replace(
        "__uint(max_entries, 1)", "__uint(max_entries, 40)"
    )
    source = source.replace("__uint(max_entries, 4)", "__uint(max_entries, 41)")
    for number in range(1, programs + 1):
        source += f"""SEC("raw_tp") int link_{number}(void *ctx)
{{
	count({number});
	bpf_tail_call(ctx, &by_number, {number});
	count(0);
	return 0;
}}
"""
    source += CHAIN[CHAIN.index('SEC("raw_tp/sys_enter")') :]
    made = policy({number - 1: f"link_{number}" for number in range(1, programs + 1)}, source)
    made["spec"]["outputs"][0]["limit"] = 50
    return made


@pytest.mark.parametrize("programs", [32, 33, 34])
def test_a_chain_of_programs_goes_as_far_as_the_kernel(programs: int) -> None:
    with policies.run(chained(programs)) as run:
        call_getppid(23)
        rows = {int(key): value for (key,), value in run.rows("calls").items() if value}
    reached = dict.fromkeys(range(1, min(programs, 33) + 1), 23)
    # Behind its jump comes the last one that was reached: its slot is empty, or it is the 34th jump.
    assert rows == {0: 23, **reached}


def test_a_jump_to_another_type_of_program_is_refused_before_a_node_hears_of_it() -> None:
    source = BY_NUMBER + 'SEC("tracepoint") int other(void *ctx) { return 0; }\n'
    says = (
        r'tailCalls\[0\].entries.59: "other" is a tracepoint program \(SEC\("tracepoint"\)\), and dispatch, '
        r"which jumps through by_number, a raw_tracepoint program .*jumps only between programs of one type. "
        r'Write SEC\("raw_tracepoint"\) for other'
    )
    with pytest.raises(BadInput, match=says):
        policies.prepare(policy({59: "other"}, source))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({300: "on_parent"}, r"entries.300: 300: by_number has 300 slots"),
        ({1: "on_parents"}, r'entries.1: "on_parents": the object has no program .*Did you mean on_parent'),
        ({"x": "on_parent"}, r'tailCalls\[0\].entries: "x"'),
    ],
)
def test_wrong_slots_are_named(entries: dict[Any, str], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        policies.prepare(policy(entries))


def test_a_map_of_another_type_is_no_program_array() -> None:
    wrong = policies.c_policy(BY_NUMBER, tailCalls=[{"map": "counts", "entries": {1: "on_parent"}}], **OUTPUTS)
    with pytest.raises(BadInput, match=r'"counts": it is of type array, and jumps go .*Known: by_number'):
        policies.prepare(wrong)


def test_the_kernels_own_refusal_is_said_in_words() -> None:
    """Past the planner: the node's array belongs to raw tracepoint programs."""
    from probefleet_agent import map_contents
    from probefleet_agent.errors import ObjectError
    from probefleet_agent.kernel import libbpf, maps
    from probefleet_agent.loaded import Loaded, MapHandle
    from probefleet_wire.v1 import plan_pb2

    from tests.kernel.support import compile_object

    source = """
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 4); __uint(key_size, 4); __uint(value_size, 4); }
slots SEC(".maps");
SEC("raw_tp/sys_enter") int caller(void *ctx) { bpf_tail_call(ctx, &slots, 1); return 0; }
SEC("tracepoint/syscalls/sys_enter_getppid") int other(void *ctx) { return 0; }
"""
    with libbpf.open_object(compile_object(source), "mixed") as opened:
        opened.load()
        fd = opened.map_fd("slots")
        programs = {name: opened.program_fd(name) for name in opened.program_names}
    instance = plan_pb2.Instance(
        title="c/mixed", tail_calls=[plan_pb2.TailCalls(map="slots", entries={0: "caller", 1: "other"})]
    )
    handle = MapHandle("slots", fd, maps.info(fd), None)
    loaded = Loaded(instance, {"slots": handle}, programs, {"other": "tracepoint/syscalls/sys_enter_getppid"})
    try:
        with pytest.raises(ObjectError, match=r"slot 1 of slots: the kernel takes no jump to other .*another type"):
            map_contents.write(loaded, instance)
        assert syscall.map_lookup(fd, bytes(4), 4) is None, "nothing of it is left"
    finally:
        loaded.close()
