"""The agents' pods, asked and hurt from inside: what the kernel holds, and kill -9."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

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
_SIGNAL = """
import os, pathlib, signal
mine = pathlib.Path("/proc/self/cgroup").read_text()
for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        same = (path / "cgroup").read_text() == mine
        command = (path / "cmdline").read_bytes().split(b"\\0")
    except OSError:
        continue
    if same and int(path.name) != os.getpid() and any(part.endswith(b"probefleet-agent") for part in command):
        print("sent", path.name, flush=True)
        os.kill(int(path.name), signal.{name})
"""
PYTHON = "/opt/probefleet/venv/bin/python"


def pods() -> dict[str, str]:
    """The agents' pods by node, of those that have one."""
    items = kube.pods(kube.SYSTEM, "app.kubernetes.io/component=agent")
    return {
        item["spec"]["nodeName"]: item["metadata"]["name"]
        for item in items
        if item["spec"].get("nodeName") and not item["metadata"].get("deletionTimestamp")
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


def pinned_programs(node: str) -> list[str]:
    """Paths of the programs that instances have pinned on the node."""
    return [path for path in pins(node) if "/instances/" in path and path.rpartition("/")[2].startswith("prog_")]


def kill(node: str) -> None:
    """kill -9 of a node's agent; the kubelet starts it again, at once the first time that a pod's container ended."""
    pod = kube.get("pod", pods()[node], kube.SYSTEM)
    if any(each["restartCount"] for each in pod["status"]["containerStatuses"]):
        kube.kubectl("delete", "pod", "-n", kube.SYSTEM, pod["metadata"]["name"], "--wait=true")
        kube.eventually(lambda: node in pods(), f"a new agent on {node}")
        kube.kubectl("wait", "-n", kube.SYSTEM, f"pod/{pods()[node]}", "--for=condition=Ready", "--timeout=60s")
    send(node, "SIGKILL")


@contextlib.contextmanager
def stopped(node: str) -> Iterator[None]:
    """Within it the node's agent does nothing."""
    send(node, "SIGSTOP")
    try:
        yield
    finally:
        send(node, "SIGCONT")


def send(node: str, signal: str) -> None:
    """Send a signal to the agent's process."""
    command = ["kubectl", "exec", "-n", kube.SYSTEM, pods()[node], "--", PYTHON, "-c", _SIGNAL.format(name=signal)]
    done = kube.run(*command, check=False)
    # The container ends with its agent, and may take along who has just ended it.
    fine = done.returncode in (0, 128 + 9) and done.stdout.count("sent") == 1
    assert fine, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
