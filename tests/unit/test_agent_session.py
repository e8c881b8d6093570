"""The agent's half of a stream: what it sends comes in the order of its numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

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
