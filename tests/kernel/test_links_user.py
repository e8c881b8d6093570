"""Many functions of user space for one program: one link where the kernel has uprobe.multi, and every call counts."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
from probefleet_agent.engine import Engine
from probefleet_agent.kernel import features

from tests.kernel import policies
from tests.kernel.support import needs
from tests.kernel.test_map_shared import HEAD, OUTPUTS, probe_map

libc = ctypes.CDLL(None)
#: Functions of the C library that nobody else in this process calls, and how often they are called here.
CALLS = {"labs": 997, "toupper": 23, "tolower": 5, "isalpha": 7, "isdigit": 11, "ispunct": 13, "isxdigit": 17}
SOURCE = """
u64 calls = 0;
SEC("uprobe") int on_it(void *ctx) { if (ours()) __sync_fetch_and_add(&calls, 1); return 0; }
"""
TOTAL = {"outputs": [{"name": "calls", "from": {"map": ".bss", "value": "calls"}, "counter": {}}], "interval": "1s"}


def call_each() -> int:
    for name, times in CALLS.items():
        function = getattr(libc, name)
        for _ in range(times):
            function(65)
    return sum(CALLS.values())


def at(symbol: str, program: str = "on_it", kind: str = "uprobe", **more: Any) -> dict[str, Any]:
    return {"program": program, kind: {"library": "libc", "symbol": symbol, **more}}


def pinned_links() -> int:
    return len(list(policies.folder().glob("probefleet/instances/*/link_*")))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["uprobe", "uretprobe"])
@pytest.mark.shows("attach/{kind}")
def test_functions_of_one_file_are_one_link_where_there_is_one(
    plain: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(features, "uprobe_multi", lambda: False)
    links = 1 if features.uprobe_multi() else len(CALLS)
    policy = policies.c_policy(SOURCE, attach=[at(name, kind=kind) for name in CALLS], **TOTAL)
    with policies.run(policy) as run:
        wanted = call_each()
        assert run.output("calls")["total"]["value"] == wanted
        assert pinned_links() == (links if features.perf_link() else 0)
        (status,) = run.measured.statuses()
        assert [way.rpartition(":")[2] for way in status.ways] == [*CALLS], "each place in words"
        if features.perf_link():  # else they end with the agent
            with Engine.open(bpffs=policies.folder()):
                call_each()
            call_each()
            assert run.output("calls")["total"]["value"] == 3 * wanted, "the next agent attaches nothing once more"


def test_entry_return_and_another_file_are_links_of_their_own() -> None:
    needs(features.uprobe_multi)
    python = "/proc/self/exe"
    attach = [
        *(at(name) for name in ("labs", "toupper")),
        *(at(name, kind="uretprobe") for name in ("labs", "toupper")),
        {"program": "on_it", "uprobe": {"path": os.path.realpath(python), "symbol": "Py_GetVersion"}},
    ]
    with policies.run(policies.c_policy(SOURCE, attach=attach, **TOTAL)) as run:
        call_each()
        for _ in range(3):
            ctypes.pythonapi.Py_GetVersion()
        assert run.output("calls")["total"]["value"] == 2 * (CALLS["labs"] + CALLS["toupper"]) + 3
        assert pinned_links() == 3


def test_a_place_in_one_process_makes_all_of_the_programs_links_plain() -> None:
    attach = [at("labs"), at("toupper"), at("tolower", pid=os.getpid()), at("isalpha", pid=1)]
    with policies.run(policies.c_policy(SOURCE, attach=attach, **TOTAL)) as run:
        call_each()
        assert run.output("calls")["total"]["value"] == CALLS["labs"] + CALLS["toupper"] + CALLS["tolower"]
        assert pinned_links() == 4


@pytest.mark.parametrize("section", ["uprobe", "uprobe/libc:toupper"])
def test_jumps_stay_within_what_is_loaded_alike(section: str) -> None:
    array = "__uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 8); __uint(key_size, 4); __uint(value_size, 4);"
    declared = f'struct {{ {array} }} both SEC(".maps");\n'
    jumper = 'SEC("uprobe") int on_it(void *ctx) { if (ours()) bpf_tail_call(ctx, &both, 3); return 0; }\n'
    in_slot = f'SEC("{section}") int in_slot(void *ctx) {{ return count(1); }}\n'
    calls = [{"map": "both", "entries": {"3": "in_slot"}}]
    alone = {**OUTPUTS, "maps": [], "attach": [at("labs"), at("toupper")]}
    with policies.run(policies.c_policy(HEAD + declared + jumper + in_slot, **alone, tailCalls=calls)) as run:
        call_each()
        assert run.rows("calls")[("1",)] == CALLS["labs"] + CALLS["toupper"]
    jumps = policies.c_policy(HEAD + declared + jumper, name="jumps", **{**alone, "maps": OUTPUTS["maps"]})
    fills = policies.c_policy(HEAD + declared + in_slot, name="fills", **OUTPUTS, tailCalls=calls)
    with policies.run(probe_map("prog-array", maxEntries=8), jumps, fills) as run:
        call_each()
        assert run.rows("calls", 1)[("1",)] == CALLS["labs"] + CALLS["toupper"]
