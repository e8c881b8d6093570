"""What is of the wrong kind is refused in whole sentences (tests/golden/refusals), and leaves nothing in the kernel.

Messages about a function that was inlined, and about a hook that another program holds, are in test_symbols.py and
test_network.py: they take a kernel function and an interface.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from probefleet_agent import execute
from probefleet_agent.errors import NotObserving
from probefleet_agent.kernel import mounts, pins
from probefleet_cli.failures import BadInput
from probefleet_wire.v1 import plan_pb2

from tests.kernel import damage, policies
from tests.kernel.support import compile_object

pytestmark = pytest.mark.kernel
GOLDEN = Path(__file__).parents[1] / "golden/refusals"
#: Names of this test alone: other processes load programs of their own meanwhile.
TAG = f"w{os.getpid() % 100_000}"
MAP = f"""
struct {{ __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, u32); __type(value, u64); }}
{TAG}_n SEC(".maps");
SEC("tracepoint/syscalls/sys_enter_getppid") int {TAG}_good(void *ctx)
{{
	u32 key = 1;
	probefleet_add(&{TAG}_n, &key, 1);
	return 0;
}}
"""


def program(body: str, before: str = "", name: str = "bad") -> str:
    """A program that is right, loaded first, and one that is not."""
    section = "tracepoint/syscalls/sys_enter_getppid"
    return f'{MAP}{before}\nSEC("{section}") int {TAG}_{name}(void *ctx)\n{{\n{body}\n}}\n'


STACK = program(
    "volatile char room[600];\nfor (int i = 0; i < 600; i++)\n\troom[i] = i;\nreturn room[bpf_get_prandom_u32() % 600];"
)
#: Compilers refuse that themselves; what comes as an object was compiled elsewhere.
STACK_UNSEEN = program('asm volatile("r0 = 0; *(u64 *)(r10 - 520) = r0" ::: "r0");\nreturn 0;')
TOO_LONG = program(
    "u64 sum = 0;\nfor (u32 i = 0; i < 4000000; i++)\n\tsum ^= bpf_get_prandom_u32() + i;\nreturn sum & 1;"
)
OTHER_TYPE = program(
    "bpf_tail_call(ctx, &slots, 1);\nreturn 0;",
    "struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 4); __uint(key_size, 4); "
    '__uint(value_size, 4); } slots SEC(".maps");\nSEC("raw_tp") int other(void *ctx) { return 0; }',
)


def c(source: str, **spec: Any) -> policies.Manifest:
    return policies.c_policy(source, **spec)


def given(data: bytes) -> policies.Manifest:
    made = policies.c_policy("")
    digest = hashlib.sha256(data).hexdigest()
    made["spec"]["program"] = {"object": {"inline": base64.b64encode(data).decode(), "sha256": digest}}
    return made


def of_another_machine() -> bytes:
    data = bytearray(compile_object('SEC("raw_tp/sys_enter") int on_it(void *ctx) { return 0; }'))
    struct.pack_into("<H", data, 18, 183)  # EM_AARCH64
    return bytes(data)


WRONG: dict[str, Callable[[], policies.Manifest]] = {
    "stack": lambda: c(STACK),
    "stack-unseen-by-the-compiler": lambda: c(STACK_UNSEEN),
    "instruction-limit": lambda: c(TOO_LONG),
    "tail-call-types": lambda: c(OTHER_TYPE, tailCalls=[{"map": "slots", "entries": {1: "other"}}]),
    # r0 = a kfunc, by its number in the kernel's types; r1 = a map, by a descriptor of the agent's.
    "kernel-function-by-number": lambda: c(program('asm volatile(".8byte 0x0001e24000002085" ::: "r0");\nreturn 0;')),
    "map-by-descriptor": lambda: c(
        program('asm volatile(".8byte 0x0000000300001118\\n.8byte 0" ::: "r1");\nreturn 0;')
    ),
    "unknown-map": lambda: c(MAP, outputs=[{"name": "x", "from": {"map": f"{TAG}_m"}, "topk": {}}]),
    "value-does-not-fit": lambda: c(
        MAP, maps=[{"name": f"{TAG}_n", "values": [{"key": 1, "value": 1 << 64}]}], budget={"mapMemory": "1Mi"}
    ),
    "another-machine": lambda: given(of_another_machine()),
    "cut-short": lambda: given(compile_object('SEC("raw_tp/sys_enter") int on_it(void *ctx) { return 0; }')[:997]),
    "no-such-symbol": lambda: c(
        program("return 0;").replace(
            f'SEC("tracepoint/syscalls/sys_enter_getppid") int {TAG}_bad', f'SEC("uprobe") int {TAG}_bad'
        ),
        attach=[{"program": f"{TAG}_bad", "uprobe": {"path": "/bin/sh", "symbol": "no_such_function"}}],
    ),
    "bcc-misspelt-tracepoint": lambda: {
        **c(""),
        "spec": {
            "scope": "Cluster",
            "program": {
                "bcc": {"source": "BPF_HASH(n);\nTRACEPOINT_PROBE(syscalls, sys_enter_getpid_) { return 0; }\n"}
            },
        },
    },
}


def said(manifest: policies.Manifest) -> str:
    """What a user reads, from the planner or from the agent."""
    try:
        with policies.run(manifest, ready=False) as run:
            (status,) = run.measured.statuses()
            return f"{status.reason}: {status.message}"
    except BadInput as error:
        return str(error)


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_in_whole_sentences_and_leaves_nothing(name: str) -> None:
    said(c(MAP))  # what stays open once it is needed: the kernel's types, its statistics
    gc.collect()
    before = damage.descriptors()
    text = said(WRONG[name]())
    gc.collect()
    assert damage.descriptors() == before
    assert not policies.folder().exists() or damage.pins(policies.folder()) == 0
    names, deadline = [f"{TAG}_n", f"{TAG}_good", f"{TAG}_bad"], time.monotonic() + 20
    while damage.in_the_kernel(names) and time.monotonic() < deadline:
        time.sleep(0.02)  # the kernel lets go of programs after a grace period
    assert damage.in_the_kernel(names) == []
    compare(name, text)


@pytest.mark.parametrize(
    ("instruction", "says"),
    [("0x0001e24000002085", "calls function 123456 of the kernel"), ("0x0000000300001118", "a map by a descriptor")],
)
def test_the_agent_looks_again(instruction: str, says: str) -> None:
    """It is root, and whoever sends it a plan need not be our operator."""
    body = f'asm volatile(".8byte {instruction}\\n.8byte 0" ::: "r0", "r1"); return 0;'
    data = compile_object(f'SEC("raw_tp/sys_enter") int it(void *ctx) {{ {body} }}')
    instance = plan_pb2.Instance(digest="c" * 32, title="object/it")
    instance.attachments.add(program="it").raw_tracepoint.name = "sys_enter"
    executor = execute.Executor(pins.root(mounts.BPFFS))
    with pytest.raises(NotObserving, match=says):
        executor.load(instance, blob=data, probe_maps={}, budget_bytes=0, filter_on=False)


def compare(name: str, text: str) -> None:
    normal = re.sub(rf"\b{TAG}_", "", text)
    normal = re.sub(r"\bbyte \d+ of", "byte N of", normal)  # where clang puts things
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(normal + "\n")
    assert normal + "\n" == path.read_text()
