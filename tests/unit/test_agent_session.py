"""The agent's half of a stream: what it sends comes in the order of its numbers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from probefleet_agent import session
from probefleet_agent.engine import Engine
from probefleet_agent.session import Dial, Session, T
from probefleet_wire.v1 import stream_pb2


class Numbering:
    """An engine that has something to send whenever it is asked."""

    behind, turns = False, (0, frozenset[str]())

    def __init__(self) -> None:
        self.sequence = 0

    def collect(self, *_: object, **__: object) -> stream_pb2.Batch:
        self.sequence += 1
        return stream_pb2.Batch(sequence=self.sequence)

    def apply(self, *_: object, **__: object) -> None:
        pass

    def ends_a_process(self, _: object) -> bool:
        return False

    def status(self) -> stream_pb2.Status:
        return stream_pb2.Status()


class Owned:
    """An engine that belongs to one thread, and is looked at a hundred times."""

    behind = False

    def __init__(self) -> None:
        self.looked: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in ("turns", "collect"):
            self.looked.append(threading.current_thread().name)
        return super().__getattribute__(name)

    @property
    def turns(self) -> int:
        return len(self.looked) // 10

    def collect(self, *_: object) -> None:
        return None

    def status(self) -> stream_pb2.Status:
        return stream_pb2.Status()


class Stepwise(Session):
    """Every call of the engine takes five rounds of the loop."""

    async def _call(self, function: Callable[[], T]) -> T:
        for _ in range(5):
            await asyncio.sleep(0)
        return function()


@pytest.mark.parametrize("steps", range(12))
def test_no_batch_overtakes_another_while_the_operator_is_slow(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator takes one that is overtaken for one that it has, and acknowledges it: its records would be lost."""

    monkeypatch.setattr(session, "TICK_SECONDS", 0)

    async def run() -> list[int]:
        stream = Stepwise(cast("Engine", Numbering()), Dial("", Path(), Path()))
        outgoing: asyncio.Queue[stream_pb2.FromAgent] = asyncio.Queue(1)
        await outgoing.put(stream_pb2.FromAgent())  # the line is full
        push = stream_pb2.FromOperator(push=stream_pb2.Push())
        async with asyncio.TaskGroup() as group:
            sampler = group.create_task(stream._sample(outgoing))
            while not outgoing._putters:  # type: ignore[attr-defined]  # it waits with the first batch
                await asyncio.sleep(0)
            pushed = group.create_task(stream._receive(push, outgoing))
            sent = []
            while len(sent) < 3:
                for _ in range(steps):
                    await asyncio.sleep(0)
                message = await outgoing.get()
                sent += [message.batch.sequence] if message.HasField("batch") else []
            sampler.cancel()
            pushed.cancel()
        stream._worker.shutdown()
        return sent

    assert asyncio.run(run()) == [1, 2, 3]


def test_no_thread_but_its_own_looks_at_what_the_engine_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push may be under way: policies come and go while another thread would count them."""
    monkeypatch.setattr(session, "TICK_SECONDS", 0)
    owned = Owned()

    async def run() -> None:
        stream = Session(cast("Engine", owned), Dial("", Path(), Path()))
        outgoing: asyncio.Queue[stream_pb2.FromAgent] = asyncio.Queue()
        sampler = asyncio.create_task(stream._sample(outgoing))
        for _ in range(3):
            await outgoing.get()
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)
        stream._worker.shutdown()

    asyncio.run(run())
    assert {name.partition("_")[0] for name in owned.looked} == {"engine"}
