"""ProbeMaps that grow: a larger map takes the place of one in use, and what was counted before and after adds up.

What dies in the middle is killed for good: a child adopts what the test pinned, lets the map grow and ends at one step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from probefleet_agent import execute, map_growing
from probefleet_agent.engine import Engine
from probefleet_agent.errors import KernelError, ObjectError
from probefleet_agent.kernel import maps, mounts, pins, syscall
from probefleet_cli import local_pods, preparation
from probefleet_core import aggregate, result
from probefleet_wire.v1 import stream_pb2

from tests.kernel import policies
from tests.kernel.support import call_getppid, wait_until

SMALL, LARGE = 64, 4096
KEYS = 61  # entries besides the one that is counted in
COUNT = "u32 key = 7; probefleet_add(&both, &key, 1);"
TOPK = {"outputs": [{"name": "calls", "from": {"map": "both"}, "topk": {}, "groupBy": ["key"], "limit": 50}]}
USE = {"interval": "1s", "maps": [{"name": "both", "share": {"probeMap": "both"}}]}
ON_OTHER = 'SEC("tracepoint/syscalls/sys_enter_sched_get_priority_max") int on_other(void *ctx)'


def probe_map(kind: str = "hash", entries: int = SMALL, **spec: Any) -> dict[str, Any]:
    key = {} if "array" in kind else {"key": "u32 key"}
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbeMap",
        "metadata": {"name": "both"},
        "spec": {"type": kind, "maxEntries": entries, **key, "value": "u64 calls", **spec},
    }


def declared(kind: str = "HASH", inside: str = "__type(key, u32); __type(value, u64);") -> str:
    return f'struct {{ __uint(type, BPF_MAP_TYPE_{kind}); __uint(max_entries, 8); {inside} }} both SEC(".maps");\n'


def writer(kind: str = "HASH", inside: str = "__type(key, u32); __type(value, u64);") -> dict[str, Any]:
    """getppid is counted under key 7; sched_get_priority_max(n) makes entry 1000 + n."""
    source = f"""{declared(kind, inside)}
ON_CALL {{ if (!ours()) return 0; {COUNT} return 0; }}
"""
    return policies.c_policy(source, name="writer", **TOPK, **USE)


def filler() -> dict[str, Any]:
    """Puts ``KEYS`` entries into the map, of values that are told apart, at the first call."""
    source = f"""{declared()}
struct {{ __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }}
rounds SEC(".maps");
{ON_OTHER}
{{
	u32 zero = 0;

	if (!ours())
		return 0;
	for (u32 i = 0; i < {KEYS}; i++) {{
		u32 key = 1000 + i;
		u64 value = 3 * i + 1;

		bpf_map_update_elem(&both, &key, &value, BPF_ANY);
	}}
	probefleet_add(&rounds, &zero, 1);
	return 0;
}}
"""
    outputs = [{"name": "rounds", "from": {"map": "rounds"}, "counter": {}}]
    return policies.c_policy(source, name="filler", outputs=outputs, **USE)


def entries_of(engine: Engine) -> dict[int, int]:
    """Key → value of the ProbeMap, past all readers."""
    (_, handle), *rest = engine._installed.maps.values()
    assert not rest
    keys, values = maps.read(handle.fd, handle.info)
    return dict(zip(keys.view("<u4")[:, 0].tolist(), values.view("<u8")[:, 0].tolist(), strict=True))


def map_id(run: policies.Run) -> int:
    (status,) = run.measured.engine.status().probe_maps  # type: ignore[attr-defined]
    return int(status.kernel_map_id)


def map_status(run: policies.Run) -> stream_pb2.MapStatus:
    (status,) = run.measured.engine.status().probe_maps  # type: ignore[attr-defined]
    return status  # type: ignore[no-any-return]


def gone(kind: str, number: int) -> bool:
    try:
        syscall.fd_by_id(kind, number).close()
    except KernelError:
        return True
    return False


def _digest(run: policies.Run, policy: int) -> Any:
    return run.measured.prepared[policy].planned.plan.instance.digest


def gaps_of(run: policies.Run, policy: int = 0) -> list[Any]:
    run.measured.sample_rest()
    return list(run.measured.results()[policy].gaps)


FILLED = {1000 + i: 3 * i + 1 for i in range(KEYS)}


def test_a_hash_grows_and_nothing_is_lost_or_counted_twice() -> None:
    with policies.run(probe_map(), writer(), filler()) as run:
        os.sched_get_priority_max(os.SCHED_OTHER)
        call_getppid(997)
        assert run.rows("calls")[("7",)] == 997
        before, engine = map_id(run), run.measured.engine
        assert isinstance(engine, Engine)
        own = {name: each.info.id for name, each in engine._installed.loaded[_digest(run, 1)].maps.items()}
        began_ns = time.time_ns()
        run.apply(probe_map(entries=LARGE), writer(), filler())
        ended_ns = time.time_ns()
        call_getppid(23)
        assert entries_of(engine) == {7: 1020, **FILLED}
        assert run.rows("calls")[("7",)] == 1020
        status = map_status(run)
        assert (status.max_entries, status.reason) == (LARGE, "")
        assert status.kernel_map_id != before
        wait_until(lambda: gone("map", before))  # the small map is held by nobody
        for policy in (0, 1):
            (gap,) = gaps_of(run, policy)
            assert began_ns <= gap.start_ns < gap.end_ns <= ended_ns
            assert gap.why == "ProbeMap default/both grew from 64 to 4,096 entries: 62 were handed over"
        again = {name: each.info.id for name, each in engine._installed.loaded[_digest(run, 1)].maps.items()}
        assert {name for name in own if own[name] != again[name]} == {"both"}, "its own maps are the ones it had"
        os.sched_get_priority_max(os.SCHED_OTHER)
        assert run.rows("rounds", 1)[("0",)] == 2
        run.apply(probe_map(entries=2 * LARGE), writer(), filler())
        call_getppid(5)
        assert run.rows("calls")[("7",)] == 1025, "twice as well"


@pytest.mark.parametrize("kind", ["array", "percpu-array", "percpu-hash", "lru-hash", "lru-percpu-hash"])
def test_each_type_that_can_be_read_and_written_grows(kind: str) -> None:
    used = writer(kind.upper().replace("-", "_").replace("PERCPU_LRU", "LRU_PERCPU"))
    with policies.run(probe_map(kind), used) as run:
        call_getppid(997)
        before = map_id(run)
        run.apply(probe_map(kind, LARGE), used)
        call_getppid(23)
        assert run.rows("calls")[("7",)] == 1020
        assert map_status(run).max_entries == LARGE
        wait_until(lambda: gone("map", before))


def test_a_trie_grows_with_its_prefixes() -> None:
    key = "struct { u32 prefixlen; u8 bytes[4]; }"
    source = f"""struct prefix {{ u32 prefixlen; u8 bytes[4]; }};
{declared("LPM_TRIE", "__uint(map_flags, BPF_F_NO_PREALLOC); __type(key, struct prefix); __type(value, u64);")}
ON_CALL
{{
	struct prefix eight = {{ .prefixlen = 8, .bytes = {{ 10 }} }};
	struct prefix host = {{ .prefixlen = 32, .bytes = {{ 10, 1, 2, 3 }} }};
	u64 zero = 0, *found;

	if (!ours())
		return 0;
	bpf_map_update_elem(&both, &eight, &zero, BPF_NOEXIST);
	found = bpf_map_lookup_elem(&both, &host);
	if (found)
		__sync_fetch_and_add(found, 1);
	return 0;
}}
"""
    outputs = {"outputs": [{"name": "calls", "from": {"map": "both"}, "counter": {}}]}
    used = policies.c_policy(source, name="writer", **outputs, **USE)
    with policies.run(probe_map("lpm-trie", key=key), used) as run:
        call_getppid(997)
        run.apply(probe_map("lpm-trie", LARGE, key=key), used)
        call_getppid(23)
        assert sum(run.rows("calls").values()) == 1020
        assert map_status(run).max_entries == LARGE


def test_a_bcc_program_and_its_ring_go_on() -> None:
    source = f"""
BPF_HASH(both, u32, u64, 8);
BPF_RINGBUF_OUTPUT(out, 8);
struct call_t {{ u64 n; }};
TRACEPOINT_PROBE(syscalls, sys_enter_getppid)
{{
    u32 key = 7;
    struct call_t call = {{}};
    u64 zero = 0, *count;
    if (bpf_get_current_pid_tgid() >> 32 != {os.getpid()})
        return 0;
    count = both.lookup_or_try_init(&key, &zero);
    if (!count)
        return 0;
    call.n = __sync_fetch_and_add(count, 1) + 1;
    out.ringbuf_output(&call, sizeof(call), 0);
    return 0;
}}
"""
    used: dict[str, Any] = {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": "ring"},
        "spec": {
            "scope": "Cluster",
            "program": {"bcc": {"source": source}},
            "outputs": [{"name": "each", "from": {"map": "out"}, "events": {}}],
            **USE,
        },
    }
    with policies.run(probe_map(), used) as run:
        call_getppid(997)
        run.apply(probe_map(entries=LARGE), used)
        call_getppid(23)
        found = run.output("each")
        assert found["total"]["value"] == 1020, found
        (gap,) = gaps_of(run)
        assert gap.why.endswith("1 were handed over")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (probe_map(entries=SMALL // 2), "it has room for 64 entries, and is to have room for 32: what finds no room"),
        (probe_map("percpu-hash", LARGE), "programs of others rely on what it is"),
        (probe_map(entries=LARGE, value="u32 calls"), "programs of others rely on what it is"),
        (probe_map(entries=LARGE, key="u64 key"), "programs of others rely on what it is"),
    ],
)
def test_what_a_map_in_use_cannot_become_is_refused_and_counting_goes_on(wanted: dict[str, Any], says: str) -> None:
    with policies.run(probe_map(), writer()) as run:
        call_getppid(997)
        before = map_status(run)
        # The planner would refuse a program that does not fit: so only the agent is asked for another map.
        push = _push(probe_map(), writer())
        other = _push(wanted, _using(wanted))
        push.probe_maps[0].CopyFrom(other.probe_maps[0])
        push.blobs.extend(each for each in other.blobs if each.sha256 == push.probe_maps[0].sha256)
        run.measured.engine.apply(push)
        call_getppid(23)
        assert run.rows("calls")[("7",)] == 1020
        after = map_status(run)
        assert (after.kernel_map_id, after.max_entries) == (before.kernel_map_id, SMALL)
        assert after.reason == "CannotGrow"
        assert says in after.message
        assert gaps_of(run) == []


def _push(*manifests: dict[str, Any]) -> stream_pb2.Push:
    return preparation.push(policies.prepare(*manifests), pods=local_pods.find(), namespace=None, version=2)


def _using(wanted: dict[str, Any]) -> dict[str, Any]:
    """A policy that fits this ProbeMap, so that it is planned."""
    spec = wanted["spec"]
    inside = f"__type(key, {spec['key'].split()[0]}); __type(value, {spec['value'].split()[0]});"
    source = declared(spec["type"].upper().replace("-", "_"), inside) + "ON_CALL { return 0; }"
    return policies.c_policy(source, name="writer", outputs=TOPK["outputs"], **USE)


@pytest.mark.parametrize(
    ("kind", "value"), [("queue", "u64 n"), ("stack", "u64 n"), ("bloom-filter", "u64 n"), ("ringbuf", "")]
)
def test_types_whose_entries_cannot_be_handed_over_say_so(kind: str, value: str) -> None:
    inside = "__type(value, u64);" if value else ""
    push_one = "bpf_map_push_elem(&both, &one, 0);" if value else "bpf_ringbuf_output(&both, &one, 8, 0);"
    source = f"""{declared(kind.upper().replace("-", "_"), inside)}
struct {{ __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }}
calls SEC(".maps");
ON_CALL {{ u32 zero = 0; u64 one = 1; if (!ours()) return 0; {push_one} probefleet_add(&calls, &zero, 1); return 0; }}
"""
    outputs = [{"name": "calls", "from": {"map": "calls"}, "counter": {}}]
    used = policies.c_policy(source, name="writer", outputs=outputs, **USE)

    def of(entries: int) -> dict[str, Any]:
        made = probe_map(kind, entries)
        made["spec"] = {"type": kind, "maxEntries": entries, **({"value": value} if value else {})}
        return made

    with policies.run(of(4096), used) as run:
        call_getppid(997)
        run.apply(of(8192), used)
        call_getppid(23)
        assert run.rows("calls")[("0",)] == 1020
        status = map_status(run)
        assert (status.max_entries, status.reason) == (4096, "CannotGrow")
        assert f"the entries of a map of type {kind} cannot be handed over: " in status.message


def test_programs_that_cannot_be_attached_again_leave_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with policies.run(probe_map(), writer(), filler()) as run:
        os.sched_get_priority_max(os.SCHED_OTHER)
        call_getppid(997)
        before = map_status(run)
        attach = execute.Executor.begin_again
        seen: list[str] = []

        def second_fails(self: execute.Executor, loaded: Any, folder: pins.Folder) -> None:
            seen.append(loaded.digest)
            if len(seen) == 2:
                raise ObjectError("the second one fails")
            attach(self, loaded, folder)

        with monkeypatch.context() as patch:
            patch.setattr(execute.Executor, "begin_again", second_fails)
            run.apply(probe_map(entries=LARGE), writer(), filler())
        call_getppid(23)
        assert run.rows("calls")[("7",)] == 1020
        after = map_status(run)
        assert (after.kernel_map_id, after.reason, after.message) == (
            before.kernel_map_id,
            "BadObject",
            "the second one fails",
        )
        for policy in (0, 1):
            (gap,) = gaps_of(run, policy)
            assert gap.why == "ProbeMap default/both was to grow, which failed"
        assert sorted(path.name for path in (policies.folder() / "probefleet/instances").iterdir()) == sorted(
            _digest(run, policy) for policy in (0, 1)
        ), "nothing half built is left"


def test_what_is_written_into_the_small_map_after_all_was_copied_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program that sleeps would: no other can be running then."""
    with policies.run(probe_map(), writer()) as run:
        call_getppid(997)
        (_, old), *_ = run.measured.engine._installed.maps.values()  # type: ignore[attr-defined]
        attach = execute.Executor.begin_again

        def late(self: execute.Executor, loaded: Any, folder: pins.Folder) -> None:
            attach(self, loaded, folder)
            syscall.map_update(old.fd, (9).to_bytes(4, "little"), (5).to_bytes(8, "little"))

        with monkeypatch.context() as patch:
            patch.setattr(execute.Executor, "begin_again", late)
            run.apply(probe_map(entries=LARGE), writer())
        (gap,) = gaps_of(run)
        assert gap.why.endswith("1 were handed over; 1 were written later, by a program that slept")


# An agent that is killed ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """A tree of pins of the test's own."""
    path = mounts.mount_bpffs() / f"probefleet-test-growing-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        with Engine.open(bpffs=path) as engine:
            engine.remove_everything()
        path.rmdir()


@functools.cache
def prepared_for(entries: int) -> list[preparation.Prepared]:
    """Compiled before any child is made, for the programs count this process's calls."""
    return policies.prepare(probe_map(entries=entries), writer(), filler())


def pushed(engine: Engine, version: int, entries: int) -> None:
    """Both policies, with a ProbeMap of this size."""
    engine.apply(preparation.push(prepared_for(entries), pods=local_pods.find(), namespace=None, version=version))


def measured(engine: Engine) -> result.Result:
    """What an operator that knows nothing yet makes of the first policy."""
    merged = aggregate.Aggregate(result.PolicyFacts.of(prepared_for(SMALL)[0].planned.plan))
    engine.hello()
    batch = engine.collect(time.time_ns(), force=True)
    assert batch is not None
    merged.apply("here", 1, batch, time.time_ns())
    return merged.result(time.time_ns(), selected_nodes=frozenset({"here"}), names=local_pods.LocalPods().name_of)


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _then_die(real: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*given: Any, **named: Any) -> Any:
        real(*given, **named)
        _die()

    return wrapped


def _in_the_second(real: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def wrapped(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return _die() if len(calls) == 2 else real(*given, **named)

    return wrapped


STEPS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "one program is detached": (execute.Executor, "halt", _then_die),
    "no program runs": (map_growing, "_halt", _then_die),
    "the entries are copied": (maps, "update_many", _then_die),
    "one program is attached": (execute.Executor, "begin_again", _then_die),
    "nothing is decided": (pins.Root, "exchange", lambda _: _die),
    "all is decided": (pins.Root, "_finish_exchange", lambda _: _die),
    "the map is in its place, the programs are not": (pins, "_remove", _in_the_second),
}


def test_an_agent_killed_at_any_step_has_grown_the_map_or_not(folder: Path) -> None:
    version = 1
    with Engine.open(bpffs=folder) as engine:
        pushed(engine, version, SMALL)
        os.sched_get_priority_max(os.SCHED_OTHER)
        call_getppid(997)
    total, entries = 997, SMALL
    for step, (place, name, wrap) in STEPS.items():
        version += 1
        prepared_for(2 * entries)
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                with Engine.open(bpffs=folder) as engine:
                    # What is done while the engine opens is no step of this.
                    setattr(place, name, wrap(getattr(place, name)))
                    pushed(engine, version, 2 * entries)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, step
        with Engine.open(bpffs=folder) as engine:
            decided = step in ("all is decided", "the map is in its place, the programs are not")
            entries = 2 * entries if decided else entries
            assert engine.status().probe_maps[0].max_entries == entries, step
            call_getppid(23)
            total += 23
            assert entries_of(engine) == {7: total, **FILLED}, step
            version += 1
            pushed(engine, version, 2 * entries)
            entries *= 2
            call_getppid(5)
            total += 5
            assert entries_of(engine) == {7: total, **FILLED}, step
            assert engine.status().probe_maps[0].max_entries == entries
            found = measured(engine)
            (output,) = found.outputs
            rows = dict(zip(output.total.labels, output.total.values[:, 0].tolist(), strict=True))
            assert {str(key[0]): value for key, value in rows.items()}["7"] == total, (step, rows)
            why = [gap.why for gap in found.gaps]
            assert why[-1].endswith("62 were handed over"), why
            if not decided and step != "one program is detached":
                assert why[-2] == "the agent ended while it let a shared map grow, which it then gave up", why
        left = [path.name for path in (folder / "probefleet/instances").iterdir()]
        assert not [name for name in left if name.startswith(("new-", "gone-"))], left
