"""What compilers made is kept: found by all that it depends on, bounded, and the hit rate is there to be read."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_operator import api, controller, errors, inventory, kube, metrics, objects, planning, results, toolchain
from probefleet_wire import kept
from probefleet_wire.v1 import stream_pb2
from prometheus_client import REGISTRY

from tests.fakes.operator_parts import open_session

C = "int on_it(void *ctx) { return 0; }"


def asked(result: str) -> float:
    return REGISTRY.get_sample_value("probefleet_compile_cache_requests_total", {"result": result}) or 0.0


class Compiler:
    """Answers with its source; fails as it is told to."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.problem: errors.ToolchainError | None = None
        self.may_end = threading.Event()
        self.may_end.set()

    def __call__(self, source: str, file_name: str) -> bytes:
        assert self.may_end.wait(20)
        self.compiled.append(f"{file_name}: {source}")
        if self.problem is not None:
            raise self.problem
        return source.encode()


def tools(compiler: Compiler, headers: bytes = b"h", **limits: int) -> toolchain.Toolchain:
    return toolchain.Toolchain(cast(api.Api, None), compiler, headers, **limits)


async def test_a_source_is_compiled_once_and_the_hit_rate_says_so() -> None:
    compiler, hits, misses = Compiler(), asked("hit"), asked("miss")
    made = tools(compiler)
    answers = [await made.compiled(C, "a.bpf.c") for _ in range(23)]
    assert answers == [C.encode()] * 23
    assert len(compiler.compiled) == 1
    assert (asked("hit") - hits, asked("miss") - misses) == (22, 1)
    assert REGISTRY.get_sample_value("probefleet_compile_cache_bytes") == len(C)


def test_an_agent_neither_has_a_compiler_of_c_nor_calls_one() -> None:
    """BCC's C and bpftrace's scripts are compiled on nodes; what clang makes comes with the push, by its digest."""
    root = Path(__file__).parents[2]
    agent = [path.read_text() for path in (root / "node_agent/probefleet_agent").rglob("*.py")]
    assert len(agent) > 50 and not any("compile_core" in text for text in agent)
    installed = (root / "images/agent.Containerfile").read_text()
    packages = {word for words in re.findall(r"apt-get install ([^&]*)", installed) for word in words.split()}
    assert "python3-bpfcc" in packages and not {word for word in packages if word.startswith(("clang", "llvm", "gcc"))}


async def test_another_name_or_source_is_another_object() -> None:
    compiler = Compiler()
    made = tools(compiler)
    for source, name in ((C, "a.bpf.c"), (C, "b.bpf.c"), (C + " ", "a.bpf.c"), (C, "a.bpf.c")):
        await made.compiled(source, name)
    assert len(compiler.compiled) == 3


async def test_who_asks_while_it_is_compiled_waits_for_the_same_object() -> None:
    compiler, hits, misses = Compiler(), asked("hit"), asked("miss")
    compiler.may_end.clear()
    made = tools(compiler)
    waiting = [asyncio.create_task(made.compiled(C, "a.bpf.c")) for _ in range(3)]
    await asyncio.sleep(0)  # each has asked
    compiler.may_end.set()
    assert await asyncio.gather(*waiting) == [C.encode()] * 3
    assert len(compiler.compiled) == 1
    assert (asked("hit") - hits, asked("miss") - misses) == (2, 1)


async def test_mistakes_are_kept_and_what_may_pass_is_tried_again() -> None:
    compiler = Compiler()
    made = tools(compiler)
    for problem, compilations in (
        (errors.ToolchainError("CompileFailed", "a.bpf.c took more than 30 s", lasting=False), 2),
        (errors.ToolchainUnavailable("CompilerUnavailable", "no memory"), 4),
        (errors.ToolchainError("CompileFailed", "a.bpf.c:3:5: error: x"), 5),
    ):
        compiler.problem = problem
        for _ in range(2):
            with pytest.raises(errors.ToolchainError, match=str(problem)) as caught:
                await made.compiled(C, "a.bpf.c")
            assert caught.value.reason == problem.reason
        assert len(compiler.compiled) == compilations


async def test_the_least_recently_used_object_makes_room() -> None:
    compiler = Compiler()
    made = tools(compiler, max_kept_bytes=30)
    for source in ("a" * 10, "b" * 10, "c" * 10, "a" * 10, "d" * 10, "a" * 10, "b" * 10):
        await made.compiled(source, "x")
    assert [each[3] for each in compiler.compiled] == ["a", "b", "c", "d", "b"]


def test_headers_are_known_by_name_and_content(tmp_path: Path) -> None:
    def digest(files: dict[str, str]) -> bytes:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        return toolchain.tree_digest(tmp_path)

    made = [digest(each) for each in ({"a.h": "x", "b.h": "y"}, {"a.h": "x", "c.h": "y"}, {"a.h": "y", "b.h": "x"})]
    assert len({*made}) == 3
    assert digest({"b.h": "y", "a.h": "x"}) == made[0]


async def test_what_agents_found_compiled_is_in_the_operators_metrics() -> None:
    def of_agents(result: str) -> float | None:
        return REGISTRY.get_sample_value("probefleet_agent_compile_cache_requests", {"result": result})

    control = controller.Controller(objects.ObjectStore(), term=7)
    unasked: Any = None
    merged = results.Results(
        control,
        cast(planning.Planning, unasked),
        cast(inventory.Inventory, unasked),
        cast(kube.Recorder, unasked),
    )
    first, second = open_session("a", number=1), open_session("b", number=2)
    for session, hits, misses in ((first, 0, 1), (second, 2, 3), (first, 4, 1), (first, 4, 1)):
        merged.batch_received(session, stream_pb2.Batch(compile_hits=hits, compile_misses=misses), 0)
    assert (of_agents("hit"), of_agents("miss")) == (6, 4)
    merged.session_closed(second, "gone")
    assert (of_agents("hit"), of_agents("miss")) == (4, 1)
    assert metrics.AGENT_COMPILE_CACHE


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 40))))
def test_it_is_never_larger_than_its_limit_and_forgets_the_oldest(steps: list[tuple[str, int]]) -> None:
    store: kept.Kept[int] = kept.Kept(100)
    there: list[tuple[str, int]] = []  # in order of use
    for key, size in steps:
        (known,) = [each for each in there if each[0] == key] or [None]
        assert store.get(key) == (known[1] if known else None)
        if known is None:
            store.put(key, size, size)
            there.append((key, size))
            while sum(each[1] for each in there) > 100:
                del there[0]
        else:
            there.remove(known)
            there.append(known)
        assert store.size_bytes == sum(each[1] for each in there) <= 100
        assert len(store) == len(there)
    assert store.hits + store.misses == len(steps)


def test_a_hit_rate_is_hits_of_all_that_were_asked_for() -> None:
    store: kept.Kept[str] = kept.Kept(100)
    assert store.hit_rate == 0.0
    assert store.get("a") is None
    store.put("a", "x", 1)
    assert [store.get("a") for _ in range(3)] == ["x"] * 3
    assert store.hit_rate == 0.75


def test_the_borders_of_parts_count() -> None:
    assert kept.digest([b"ab", b"c"]) != kept.digest([b"a", b"bc"]) != kept.digest([b"abc"])
