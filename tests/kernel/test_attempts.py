"""A program whose loading ends the agent's process twice is refused the third time, and the others run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from probefleet_agent.engine import Engine
from probefleet_agent.kernel import mounts
from probefleet_wire.v1 import stream_pb2

from tests.kernel.test_engine import push

pytestmark = pytest.mark.kernel
CRASHES = "c" * 32
#: An agent: it gets a push of two policies, of which libbpf cannot load one without crashing. (Objects that were found
#: to do that are refused before libbpf has them.)
AGENT = """
import json, os, signal, sys
from pathlib import Path
from probefleet_agent import main
from probefleet_agent.engine import Engine
from probefleet_agent.kernel import libbpf
from probefleet_wire.v1 import stream_pb2
main.configure_logs("text")
load = libbpf.Object.load
def crash(self):
    if self.name == "object/crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    load(self)
libbpf.Object.load = crash
with Engine.open(bpffs=Path(sys.argv[1])) as engine:
    engine.apply(stream_pb2.Push.FromString(sys.stdin.buffer.read()))
    print(json.dumps({each.policy_uid: [each.state, each.reason, each.message] for each in engine.status().policies}))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A tree of pins of the test's own."""
    path = mounts.mount_bpffs() / "probefleet-test-attempts"
    path.mkdir(exist_ok=True)
    yield path
    with Engine.open(bpffs=path) as engine:
        engine.remove_everything()
    path.rmdir()


def both(version: int) -> stream_pb2.Push:
    made = push(version)
    plan = made.plans.add()
    plan.CopyFrom(made.plans[0])
    plan.policy_uid, plan.instance.digest, plan.instance.title = "crashes", CRASHES, "object/crashes"
    made.selections.add(policy_uid="crashes", everything=True)
    return made


def agent(folder: Path, pushed: stream_pb2.Push) -> tuple[int, dict[str, Any]]:
    """How a process ended, and what it said of each policy before."""
    command = [sys.executable, "-c", AGENT, str(folder)]
    done = subprocess.run(command, input=pushed.SerializeToString(), capture_output=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}


def test_what_crashes_the_agent_twice_is_refused_and_the_rest_runs(folder: Path) -> None:
    assert [agent(folder, both(version))[0] for version in (1, 2)] == [-signal.SIGSEGV] * 2
    status, said = agent(folder, both(3))
    assert status == 0
    assert said["p"] == [stream_pb2.PolicyStatus.READY, "", ""]
    state, reason, message = said["crashes"]
    assert (state, reason) == (stream_pb2.PolicyStatus.FAILED, "BadObject")
    assert message.startswith("the agent's process ended 2 times while it loaded this program")


def test_one_end_may_have_been_anything_and_is_forgotten_with_the_policy(folder: Path) -> None:
    assert agent(folder, both(1))[0] == -signal.SIGSEGV
    # Without the policy for once: then it counts anew.
    assert agent(folder, push(2)) == (0, {"p": [stream_pb2.PolicyStatus.READY, "", ""]})
    assert [agent(folder, both(version))[0] for version in (3, 4)] == [-signal.SIGSEGV] * 2
    assert agent(folder, both(5))[0] == 0


def test_a_load_that_succeeds_or_is_refused_leaves_no_note(folder: Path) -> None:
    with Engine.open(bpffs=folder) as engine:
        pushed = push(1)
        pushed.plans[0].instance.attachments[0].tp_btf.name = "no_such_tracepoint"
        for version in range(1, 5):
            pushed.version = version
            pushed.plans[0].generation = version
            engine.apply(pushed)
            (status,) = engine.status().policies
            assert status.reason == "NoSuchAttachPoint", "four times the same words"
