"""Planning alone: which policies get a plan, when it is made anew, and what is said of those that get none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from probefleet_core import catalog, planner, policy, values
from probefleet_operator import errors, objects, planning, toolchain
from probefleet_wire import clang

from tests.fakes.operator_parts import FakeToolchain, raw_map, raw_policy

ROOT = Path(__file__).resolve().parents[2]
SYSCOUNT = ROOT / "build" / "bpf" / "syscount.bpf.o"


class Setup:
    """Planning with a real catalog of one probe, a real planner and a compiler that the test answers for."""

    def __init__(self, probes: catalog.Catalog) -> None:
        self.store, self.tools, self.blobs = objects.ObjectStore(), FakeToolchain(), toolchain.Blobs()
        self.changes = 0
        self._news = asyncio.Event()
        self.pushed: set[str] = set()
        self.plans = planning.Planning(
            self.store,
            self.tools,
            self.blobs,
            probes,
            on_change=self._changed,
            cluster_size=lambda: (3, 2),
            pushed_objects=lambda: self.pushed,
        )

    def _changed(self) -> None:
        self.changes += 1
        self._news.set()

    async def change(self) -> None:
        """Wait for the next one."""
        self._news.clear()
        await self._news.wait()

    def put(self, *raws: dict[str, Any]) -> None:
        for raw in raws:
            self.store.observe(raw["kind"], raw, gone=False)
        self.plans.refresh()

    def delete(self, raw: dict[str, Any]) -> None:
        self.store.observe(raw["kind"], raw, gone=True)
        self.plans.refresh()

    async def until_settled(self) -> None:
        """As the controller does: refresh until everything is planned or refused."""
        async with asyncio.timeout(20):
            while True:
                self.plans.refresh()
                if self.plans.idle and len(self.plans.maps) == len(self.store.all("ProbeMap")):
                    return
                await self.change()

    def entry(self, name: str) -> planning.Entry:
        return self.plans.entries[values.PolicyUid(name)]

    def plan(self, name: str) -> Any:
        return next(each.plan for each in self.plans.candidates() if each.name == name)


@pytest.fixture(scope="module")
def probes() -> catalog.Catalog:
    text = (ROOT / "bpf" / "syscount" / "probe.yaml").read_text()
    return catalog.Catalog({"syscount": catalog.parse_probe("syscount", text, SYSCOUNT.read_bytes())})


@asynccontextmanager
async def planned(probes: catalog.Catalog) -> AsyncIterator[Setup]:
    setup = Setup(probes)
    try:
        yield setup
    finally:
        await setup.plans.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "RETRY_FIRST_SECONDS", 0.01)


async def test_a_catalog_policy_gets_a_plan_and_its_object_is_kept(probes: catalog.Catalog) -> None:
    async with planned(probes) as setup:
        setup.put(raw_policy("calls"))
        assert setup.entry("calls").pending and setup.plan("calls") is None
        await setup.until_settled()
        plan = setup.plan("calls")
        assert (plan.name, plan.generation) == ("calls", 1)
        assert setup.blobs.names() == {plan.instance.object.sha256}
        assert setup.changes == 1
        assert planning.program_title(setup.entry("calls")) == "catalog/syscount"


async def test_a_refused_policy_is_a_candidate_without_a_plan_and_is_not_tried_again(probes: catalog.Catalog) -> None:
    async with planned(probes) as setup:
        setup.put(raw_policy("slip", program={"catalog": {"name": "syscuont"}}), raw_policy("fine"))
        await setup.until_settled()
        refusal = setup.entry("slip").refusal
        assert refusal is not None and (refusal.reason, refusal.transient) == ("Invalid", False)
        assert "syscount" in refusal.message
        assert setup.plan("slip") is None and setup.plan("fine") is not None
        changes = setup.changes
        await setup.until_settled()
        assert setup.changes == changes


async def test_a_spec_that_cannot_be_read_keeps_what_was_read_before(probes: catalog.Catalog) -> None:
    async with planned(probes) as setup:
        setup.put(raw_policy("calls"))
        await setup.until_settled()
        setup.put(raw_policy("calls", 2, interval="soon"))
        await setup.until_settled()
        entry = setup.entry("calls")
        assert entry.refusal is not None and entry.settled_generation == 2
        assert entry.policy is not None and entry.policy.generation == 1, "nodes keep the last good generation"
        assert setup.plan("calls").generation == 1


async def test_while_a_new_generation_is_compiled_the_last_plan_stands(probes: catalog.Catalog) -> None:
    async with planned(probes) as setup:
        setup.tools.objects["own.bpf.c"] = c_object()
        setup.put(raw_policy("own", scope="Cluster", program={"c": {"source": "one"}}))
        await setup.until_settled()
        first = setup.plan("own")
        setup.tools.hold = asyncio.Event()
        setup.put(raw_policy("own", 2, scope="Cluster", interval="3s", program={"c": {"source": "two"}}))
        assert setup.entry("own").pending and setup.plan("own") == first
        setup.tools.hold.set()
        await setup.until_settled()
        assert (setup.plan("own").generation, setup.plan("own").interval_ms) == (2, 3000)


async def test_what_may_pass_is_tried_again(probes: catalog.Catalog) -> None:
    async with planned(probes) as setup:
        setup.tools.objects["own.bpf.c"] = errors.ToolchainUnavailable("CompilerUnavailable", "no memory")
        setup.put(raw_policy("own", scope="Cluster", program={"c": {"source": "one"}}))
        await setup.until_settled()
        refusal = setup.entry("own").refusal
        assert refusal is not None and refusal.transient
        setup.tools.objects["own.bpf.c"] = c_object()
        async with asyncio.timeout(5):
            while setup.entry("own").refusal is not None:
                await setup.change()
        assert setup.plan("own") is not None


async def test_words_of_the_compiler_are_the_refusals(probes: catalog.Catalog) -> None:
    async with planned(probes) as setup:
        setup.tools.objects["own.bpf.c"] = errors.ToolchainError("CompileFailed", "own.bpf.c:3:5: error: x")
        setup.put(raw_policy("own", scope="Cluster", program={"c": {"source": "one"}}))
        await setup.until_settled()
        refusal = setup.entry("own").refusal
        assert refusal == planning.Refusal("CompileFailed", "own.bpf.c:3:5: error: x", transient=False)


async def test_a_bug_in_planning_one_policy_ends_no_other(
    probes: catalog.Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = planner.plan

    def broken(parsed: values.ProbePolicy, **more: Any) -> planner.Planned:
        if parsed.name == "bug":
            raise RuntimeError("never thought of")
        return real(parsed, **more)

    monkeypatch.setattr(planner, "plan", broken)
    async with planned(probes) as setup:
        setup.put(raw_policy("bug"), raw_policy("fine"))
        await setup.until_settled()
        refusal = setup.entry("bug").refusal
        assert refusal is not None and refusal.reason == "InternalError" and "never thought of" in refusal.message
        assert setup.plan("fine") is not None


async def test_a_policy_waits_for_the_maps_of_its_namespace_and_for_no_others(probes: catalog.Catalog) -> None:
    async with planned(probes) as setup:
        setup.tools.objects["shared.probemap.c"] = map_object()
        setup.tools.hold = asyncio.Event()
        setup.put(raw_map("shared"), raw_policy("here"), raw_policy("there", namespace="far"))
        async with asyncio.timeout(20):
            while setup.entry("there").pending:
                await setup.change()
        setup.plans.refresh()
        assert setup.entry("here").pending and not setup.plans.idle
        setup.tools.hold.set()
        await setup.until_settled()
        assert setup.plan("here") is not None
        assert setup.plans.maps["shared"].compiled is not None


async def test_a_map_that_does_not_compile_says_why_and_policies_are_planned_without_it(
    probes: catalog.Catalog,
) -> None:
    async with planned(probes) as setup:
        setup.tools.objects["shared.probemap.c"] = errors.ToolchainError("CompileFailed", "unknown type name")
        setup.put(raw_map("shared"), raw_policy("here"))
        await setup.until_settled()
        refusal = setup.plans.maps["shared"].refusal
        assert refusal is not None and refusal.message == "unknown type name"
        assert setup.plan("here") is not None
        user = raw_policy("user", maps=[{"name": "calls", "share": {"probeMap": "shared"}}])
        setup.put(user)
        await setup.until_settled()
        assert setup.plan("user") is None and setup.entry("user").refusal is not None


async def test_what_is_deleted_while_it_is_planned_never_comes_back(probes: catalog.Catalog) -> None:
    async with planned(probes) as setup:
        setup.tools.objects["own.bpf.c"] = c_object()
        setup.tools.hold = asyncio.Event()
        raw = raw_policy("own", scope="Cluster", program={"c": {"source": "one"}})
        setup.put(raw)
        await asyncio.sleep(0)  # its task begins, and waits
        setup.delete(raw)
        setup.tools.hold.set()
        await setup.until_settled()
        assert not setup.plans.entries and not setup.plans.candidates() and not setup.blobs.names()


async def test_an_object_is_kept_as_long_as_a_node_was_told_to_have_it(probes: catalog.Catalog) -> None:
    async with planned(probes) as setup:
        raw = raw_policy("calls")
        setup.put(raw)
        await setup.until_settled()
        setup.pushed = setup.blobs.names()
        setup.delete(raw)
        assert setup.blobs.names() == setup.pushed
        setup.pushed = set()
        setup.plans.refresh()
        assert not setup.blobs.names()


def c_object() -> bytes:
    """An object that the planner takes for C: the catalog's own."""
    return SYSCOUNT.read_bytes()


def map_object() -> bytes:
    """What clang makes of the ProbeMap `shared`."""
    source = planner.probe_map_source(policy.parse_probe_map(raw_map("shared")))
    return clang.compile_core(source, name="shared.probemap.c", include_dirs=[ROOT / "bpf" / "include"]).object
