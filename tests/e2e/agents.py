"""The agents' pods, asked and hurt from inside: what the kernel holds, and kill -9."""

from __future__ import annotations

import json

from tests.e2e import kube

_PROGRAMS = """
import json
from probefleet_agent.kernel import syscall
from probefleet_agent.errors import KernelError
names = []
for number in syscall.ids("program"):
    try:
        with syscall.fd_by_id("program", number) as fd:
            names.append(syscall.program_info(fd).name)
    except KernelError:
        pass  # ended in between
print(json.dumps(names))
"""
_PINS = "import json,pathlib; print(json.dumps([str(p) for p in pathlib.Path('/sys/fs/bpf/probefleet').rglob('*')]))"
# With the host's processes in view: exactly the one of this container.
_KILL = """
import os, pathlib, signal
mine = pathlib.Path("/proc/self/cgroup").read_text()
for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        same = (path / "cgroup").read_text() == mine
        command = (path / "cmdline").read_bytes().split(b"\\0")
    except OSError:
        continue
    if same and int(path.name) != os.getpid() and any(part.endswith(b"probefleet-agent") for part in command):
        os.kill(int(path.name), signal.SIGKILL)
        print("killed", path.name)
"""
PYTHON = "/opt/probefleet/venv/bin/python"


def pods() -> dict[str, str]:
    """The agents' pods by node."""
    items = json.loads(
        kube.kubectl("get", "pods", "-n", kube.SYSTEM, "-l", "app.kubernetes.io/component=agent", "-o", "json")
    )["items"]
    return {
        item["spec"]["nodeName"]: item["metadata"]["name"]
        for item in items
        if not item["metadata"].get("deletionTimestamp")
    }


def ask(node: str, script: str) -> str:
    """Run Python in the agent's container of a node."""
    return kube.kubectl("exec", "-n", kube.SYSTEM, pods()[node], "--", PYTHON, "-c", script)


def programs(node: str) -> list[str]:
    """Names of all BPF programs in the node's kernel."""
    found: list[str] = json.loads(ask(node, _PROGRAMS))
    return found


def pins(node: str) -> list[str]:
    """Everything pinned on the node by Probefleet."""
    found: list[str] = json.loads(ask(node, _PINS))
    return found


def kill(node: str) -> None:
    """kill -9 of a node's agent; the kubelet starts it again."""
    said = ask(node, _KILL)
    assert said.count("killed") == 1, said
