"""Stacks of programs of one's own: from maps of addresses and of build ids, and from several maps, each named right."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.kernel import policies
from tests.kernel.support import call_getppid

PLAIN = "__uint(value_size, 127 * 8);"
BY_BUILD_ID = "__uint(value_size, 127 * 32); __uint(map_flags, BPF_F_STACK_BUILD_ID);"


def stack_map(name: str, inside: str = PLAIN, entries: int = 64) -> str:
    parts = f"__uint(type, BPF_MAP_TYPE_STACK_TRACE); __uint(max_entries, {entries}); __uint(key_size, 4); {inside}"
    return f'struct {{ {parts} }} {name} SEC(".maps");\n'


def policy(maps: str, members: str, body: str, more: str = "") -> dict[str, Any]:
    source = f"""
{maps}
struct where {{ pid_nr_t process; {members} }};
struct {{ __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, struct where); __type(value, u64); }}
calls SEC(".maps");
{more}
ON_CALL
{{
	struct where key = {{ .process = only }};
	if (!ours())
		return 0;
	{body}
	probefleet_add(&calls, &key, 1);
	return 0;
}}
"""
    outputs = [{"name": "calls", "from": {"map": "calls"}, "stacks": {}, "groupBy": []}]
    return policies.c_policy(source, outputs=outputs, interval="1s")


def of(run: policies.Run, count: int) -> list[str]:
    """The frames of the one stack that was counted so often, outermost first."""
    (row,) = run.output("calls")["total"]["rows"]
    assert row["value"] == count
    return str(row["key"][-1]).split(";")[1:]


USER = "key.user = bpf_get_stackid(ctx, &users, BPF_F_USER_STACK);"


def test_a_stack_by_build_ids_has_the_names_that_one_of_addresses_has() -> None:
    found = []
    for inside in (PLAIN, BY_BUILD_ID):
        with policies.run(policy(stack_map("users", inside), "user_stack_id_t user;", USER)) as run:
            call_getppid(997)
            found.append(of(run, 997))
            frames = run.output("calls")["frames"]
            assert frames["named"] + frames["unknown"] == 997 * len(found[-1])
    assert found[0] == found[1]
    assert "getppid" in found[0][-1]


@pytest.mark.parametrize("entries", [64, 1], ids=["apart", "under one number"])
def test_stacks_of_the_kernel_and_of_the_process_come_each_from_its_own_map(entries: int) -> None:
    maps = stack_map("kernels", entries=entries) + stack_map("users", entries=entries)
    members = "kernel_stack_id_t kernel; user_stack_id_t user;"
    body = USER + "key.kernel = bpf_get_stackid(ctx, &kernels, 0);"
    with policies.run(policy(maps, members, body)) as run:
        call_getppid(23)
        frames = of(run, 23)
    own = [each for each in frames if not each.endswith("_[k]")]
    assert "getppid" in own[-1]
    assert frames[len(own)].startswith(("entry_SYSCALL_64", "el0")) and "syscall" in frames[-1]


def test_a_stack_of_the_kernel_is_named_whatever_its_type_says() -> None:
    body = "key.stack = bpf_get_stackid(ctx, &kernels, 0);"
    with policies.run(policy(stack_map("kernels"), "stack_id_t stack;", body)) as run:
        call_getppid(23)
        frames = of(run, 23)
    assert all(each.endswith("_[k]") for each in frames)
    assert frames[0].startswith(("entry_SYSCALL_64", "el0"))


def test_an_id_that_could_be_of_two_stacks_is_said_and_not_guessed() -> None:
    """Maps of one stack each: both have it under the number 0, and another one."""
    other = """
SEC("tracepoint/syscalls/sys_enter_sched_get_priority_max") int on_other(void *ctx)
{
	if (ours())
		bpf_get_stackid(ctx, &others, BPF_F_USER_STACK);
	return 0;
}
"""
    maps = stack_map("users", entries=1) + stack_map("others", entries=1)
    with policies.run(policy(maps, "user_stack_id_t user;", USER, other)) as run:
        os.sched_get_priority_max(os.SCHED_OTHER)
        call_getppid(23)
        assert of(run, 23) == []
        (report,) = run.measured.reports()
    assert report["uncounted"] == ["stacks whose id is in more than one stack trace map"]
