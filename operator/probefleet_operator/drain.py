"""Before the operator is uninstalled: every policy is deleted, and every agent has said that nothing is left.

Two sides. `python -m probefleet_operator.drain` runs in the chart's pre-delete hook: it deletes all ProbePolicies and
ProbeMaps, and the pod that `helm test` left, then asks the operator's `/drainz` until it says yes. `Drain` is that
route: the operator pushes what the deletions make of the desired state as ever, and this only looks whether all nodes
have answered.

Why not at the agent's end (preStop): an upgrade looks the same from there, and must not lose a count.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import click
from aiohttp import web

from probefleet_operator import api, controller, errors, session

ASK_SECONDS = 0.5
MAX_NAMED = 20  # nodes named in an answer
KINDS = ("probepolicies", "probemaps")
TEST_POD = "probefleet-test"  # of the chart's test hook: helm removes no hooks


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the removal is."""

    policies: int  # that the operator still knows
    busy: tuple[str, ...]  # nodes whose agent has not yet said that it runs nothing
    away: tuple[str, ...]  # nodes that had an agent and have none connected now: nobody can say

    @property
    def done(self) -> bool:
        """Nothing is left anywhere."""
        return not self.policies and not self.busy and not self.away

    def to_json(self) -> api.Json:
        """As `/drainz` answers."""
        return {
            "done": self.done,
            "policies": self.policies,
            "busyNodes": len(self.busy),
            "busy": list(self.busy[:MAX_NAMED]),
            "awayNodes": len(self.away),
            "away": list(self.away[:MAX_NAMED]),
        }


def is_empty(node: session.Session) -> bool:
    """Whether a node's agent has said, after the last push, that it runs nothing and holds no map."""
    return node.running is not None and not node.running and not node.probe_maps


class Drain:
    """The route `/drainz`; answers 503 until this process leads."""

    def __init__(self, control: Callable[[], controller.Controller | None]) -> None:
        self._control = control

    def routes(self) -> list[web.RouteDef]:
        """For the HTTP server."""
        return [web.get("/drainz", self._answer)]

    async def _answer(self, _: web.Request) -> web.Response:
        control = self._control()
        if control is None or not control.complete:
            return web.json_response({"error": "this replica does not lead, or has not listed everything"}, status=503)
        return web.json_response(control_progress(control).to_json())


def control_progress(control: controller.Controller) -> Progress:
    """What is still there, by what the agents said last."""
    sessions = control.sessions()
    return Progress(
        policies=control.policies(),
        busy=tuple(sorted(node for node, each in sessions.items() if not is_empty(each))),
        away=tuple(sorted(control.seen() - sessions.keys())),
    )


async def drain(
    client: api.Api, operator: str, timeout_seconds: float, say: Callable[[str], None], *, namespace: str
) -> int:
    """Delete everything and wait; the exit status. Nodes that are away are named, and do not hold up the rest.

    ``namespace`` is the installation's own.
    """
    end = time.monotonic() + timeout_seconds
    for plural in KINDS:
        say(f"deleted {await _delete_all(client, plural)} {plural}")
    await _delete(client, f"/api/v1/namespaces/{namespace}/pods/{TEST_POD}")
    last = "the operator has not answered"
    left: api.Json = {"busyNodes": -1}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
        while time.monotonic() < end:
            try:
                async with http.get(f"{operator}/drainz") as response:
                    answer: api.Json = await response.json()
                if response.status == 200:
                    left = answer
                    if answer["done"]:
                        say("no program, map or pin is left on any node")
                        return 0
                    last = (
                        f"{answer['policies']} policies known; {answer['busyNodes']} nodes still remove "
                        f"{answer['busy']}; {answer['awayNodes']} nodes have no agent connected {answer['away']}"
                    )
                else:
                    last = str(answer.get("error"))
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as problem:
                last = f"{operator}/drainz: {type(problem).__name__}: {problem}"
            await asyncio.sleep(ASK_SECONDS)
    say(f"after {timeout_seconds:.0f} s: {last}")
    if left["busyNodes"] == 0 and left["policies"] == 0:
        say(f"Going on without them. Their pins stay until `probefleet purge` or a reboot: {left['away']}")
        return 0
    say(
        "Programs may be left on nodes. Mend the operator or the agents and uninstall again; or uninstall with "
        "`helm uninstall --no-hooks` and run `probefleet purge` on every node."
    )
    return 1


async def _delete_all(client: api.Api, plural: str) -> int:
    deleted = 0
    try:
        async for page in client.pages(f"{api.GROUP_PATH}/{plural}", accept=api.METADATA_ONLY):
            for item in page.get("items") or ():
                metadata = item["metadata"]
                path = f"{api.GROUP_PATH}/namespaces/{metadata['namespace']}/{plural}/{metadata['name']}"
                deleted += await _delete(client, path)
    except errors.NotFound:
        pass  # the kind itself is gone: then so is every object of it
    return deleted


async def _delete(client: api.Api, path: str) -> bool:
    """Whether it was there."""
    try:
        await client.request("DELETE", path)
    except errors.NotFound:
        return False  # it never was, or somebody was faster
    return True


@click.command()
@click.option("--operator", required=True, help="The operator's HTTP port: http://HOST:PORT")
@click.option("--namespace", required=True, help="Where all of it is installed.")
@click.option("--timeout-seconds", default=60.0, show_default=True)
def main(*, operator: str, namespace: str, timeout_seconds: float) -> None:
    """Delete all ProbePolicies and ProbeMaps and wait until no node runs anything."""

    async def body() -> int:
        async with api.Api(api.in_cluster(os.environ)) as client:
            return await drain(client, operator, timeout_seconds, _say, namespace=namespace)

    try:
        sys.exit(asyncio.run(body()))
    except errors.OperatorError as problem:
        print(problem, file=sys.stderr)
        sys.exit(1)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
