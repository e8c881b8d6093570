"""Many agents in one process, for run.py: each a real TLS connection and a real stream, without a kernel.

`python -m tests.scale.agents TARGET CA FIRST COUNT PODS`: nodes FIRST … FIRST+COUNT-1. On standard input come words,
one a line, and on standard output go answers as JSON lines:

    connected       → {"connected": n, "problems": […]}   when all streams are open, or cannot be
    seen NAME       → {"times": […]}                      wall clock when the push with that policy came, of each agent
    load SECONDS    → {"batches": n, "acks": n}           after so long, every agent sending each interval
    end             → the process ends

Models: Hello, an empty first Status, READY for every push, one changed Table a policy each interval, at whole intervals
plus a node's own jitter, as agents send it. Does not model: reading maps, re-sent batches, reconnects.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from probefleet_wire.v1 import plan_pb2, stream_pb2, stream_pb2_grpc

from tests.fakes.agent import counter_table, everything_ready

INTERVAL_SECONDS = 10.0
CONNECTING = 16  # at a time


class Agent:
    """One node."""

    def __init__(self, number: int, pods: int) -> None:
        self.number, self.node = number, f"node-{number:05}"
        self.pods = [f"pod-{number:05}-{pod}" for pod in range(pods)]
        self.plans: dict[str, plan_pb2.Plan] = {}
        self.open = False
        self.acks = self.sequence = 0
        self._sent: dict[str, int] = {}
        self._call: Any = None
        self._writing = asyncio.Lock()

    async def live(self, fleet: Fleet) -> None:
        """Connect and answer until cancelled."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "localhost")]
        credentials = grpc.ssl_channel_credentials(fleet.ca)
        async with grpc.aio.secure_channel(fleet.target, credentials, options=options) as channel:
            async with fleet.connecting:  # a call begins at once, and with it the token's review
                self._call = stream_pb2_grpc.FleetStub(channel).Session(
                    metadata=[("authorization", f"Bearer {self.node}")]
                )
                await self._say(
                    hello=stream_pb2.Hello(
                        protocol=1, node=self.node, boot_id="b00t", kernel_release="6.12", kernel_build="#1",
                        machine="x86_64", cpus=8,
                    )
                )  # fmt: skip
                await self._say(status=stream_pb2.Status())
                await self._hear(fleet)  # the first push, empty or not
                self.open = True
                fleet.changed()
            while await self._hear(fleet):
                pass

    async def _hear(self, fleet: Fleet) -> bool:
        """Take one message and answer it; False at the stream's end."""
        message = await self._call.read()
        if not isinstance(message, stream_pb2.FromOperator):
            self.open = False
            return False
        if (answer := self._heard(message, fleet)) is not None:
            await self._say(status=answer)
        return True

    def _heard(self, message: stream_pb2.FromOperator, fleet: Fleet) -> stream_pb2.Status | None:
        if message.WhichOneof("message") == "ack":
            self.acks += 1
            return None
        self.plans = {plan.name: plan for plan in message.push.plans}
        for name in self.plans:
            fleet.seen[name].setdefault(self.number, time.time())
        fleet.changed()
        return everything_ready(message.push)

    async def sample(self, until: float) -> int:
        """Batches at the node's time in every interval; how many were sent."""
        offset = (self.number * 0.618) % 1 * INTERVAL_SECONDS
        batches = 0
        while True:
            now = time.time()
            due = (now // INTERVAL_SECONDS) * INTERVAL_SECONDS + offset
            due += INTERVAL_SECONDS if due <= now else 0
            if due > until:
                return batches
            await asyncio.sleep(due - now)  # nodes sample by the clock
            self.sequence += 1
            batch = stream_pb2.Batch(sequence=self.sequence, time_ns=time.time_ns())
            for plan in self.plans.values():
                batch.tables.append(self._table(plan))
                batch.instances.add(
                    digest=plan.instance.digest, policy_uids=[plan.policy_uid], runs=self.sequence * 1000,
                    run_time_ns=self.sequence * 100_000, stats_time_ns=self.sequence * 10**9, cost_known=True,
                )  # fmt: skip
            await self._say(batch=batch)
            batches += 1

    def _table(self, plan: plan_pb2.Plan) -> stream_pb2.Table:
        """The first with all keys, later ones with new values of the same rows."""
        times = self._sent[plan.name] = self._sent.get(plan.name, 0) + 1
        counts = {pod: times * (17 + place) for place, pod in enumerate(self.pods)}
        table = counter_table(plan, plan.outputs[0].name, counts)
        if times > 1:
            table.first_new_row, table.new_rows = len(counts), 0
            del table.keys[:]
        return table

    async def _say(self, **message: Any) -> None:
        async with self._writing:
            await self._call.write(stream_pb2.FromAgent(**message))


class Fleet:
    """All agents of this process."""

    def __init__(self, target: str, ca: bytes, first: int, count: int, pods: int) -> None:
        self.target, self.ca = target, ca
        self.agents = [Agent(number, pods) for number in range(first, first + count)]
        self.seen: dict[str, dict[int, float]] = defaultdict(dict)  # policy → agent → when
        self.connecting = asyncio.Semaphore(CONNECTING)
        self._change = asyncio.Event()

    def changed(self) -> None:
        self._change.set()

    async def until(self, holds: Any) -> None:
        while not holds():
            self._change.clear()
            await self._change.wait()

    async def run(self) -> None:
        """Obey standard input."""
        lives = [asyncio.create_task(agent.live(self), name=agent.node) for agent in self.agents]
        for life in lives:
            life.add_done_callback(lambda _: self.changed())
        loop = asyncio.get_running_loop()
        while (words := (await loop.run_in_executor(None, sys.stdin.readline)).split()) and words[0] != "end":
            print(json.dumps(await self._answer(words, lives)), flush=True)
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)

    async def _answer(self, words: list[str], lives: list[asyncio.Task[None]]) -> dict[str, Any]:
        match words:
            case ["connected"]:
                await self.until(lambda: all(a.open or t.done() for a, t in zip(self.agents, lives, strict=True)))
                problems = [str(life.exception()) for life in lives if life.done() and not life.cancelled()]
                return {"connected": sum(a.open for a in self.agents), "problems": problems[:3]}
            case ["seen", name]:
                await self.until(lambda: len(self.seen[name]) == len(self.agents))
                return {"times": sorted(self.seen[name].values())}
            case ["load", seconds]:
                before = sum(agent.acks for agent in self.agents)
                until = time.time() + float(seconds)
                sent = await asyncio.gather(*(agent.sample(until) for agent in self.agents))
                await asyncio.sleep(1.0)  # the last acknowledgements are on their way
                return {"batches": sum(sent), "acks": sum(agent.acks for agent in self.agents) - before}
        raise ValueError(words)


if __name__ == "__main__":
    target, ca_file, *numbers = sys.argv[1:]
    first, count, pods = map(int, numbers)
    np.seterr(all="raise")
    asyncio.run(Fleet(target, Path(ca_file).read_bytes(), first, count, pods).run())
