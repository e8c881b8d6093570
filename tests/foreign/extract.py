"""Debian's bpfcc-tools as policies: each script's C text and attach points, taken from the script itself as it is
installed.

Called by ``run``. In: facts of the kernel that the programs are meant for. Out: a ProbePolicy each, or the reason
why there is none. Nothing of the package is copied into the repository.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.foreign.record_bcc import MARK

HERE = Path(__file__).parent
PACKAGE = "bpfcc-tools"
SUFFIX = "-bpfcc"
SECONDS = 60
# perf_event_open(2): type and config of what scripts ask for.
PERF_EVENTS = {
    (0, 0): "cpu-cycles",
    (0, 2): "cache-references",
    (0, 3): "cache-misses",
    (1, 0): "cpu-clock",
    (1, 1): "task-clock",
    (1, 2): "page-faults",
    (1, 3): "context-switches",
}
LIBRARIES = Path("/lib") / f"{os.uname().machine}-linux-gnu"


@dataclass(frozen=True, slots=True)
class Tool:
    """One script; ``why`` is set where it gives no program."""

    name: str
    source: str = ""
    attach: tuple[dict[str, Any], ...] = ()
    why: str = ""
    files: tuple[str, ...] = field(default=())

    def policy(self) -> dict[str, Any]:
        """The whole of it, as a user would write it down."""
        spec: dict[str, Any] = {
            "scope": "Cluster",
            "program": {"bcc": {"source": self.source}},
            "budget": {"cpu": "8", "mapMemory": "512Mi"},
            "interval": "1s",
        }
        if self.attach:
            spec["attach"] = list(self.attach)
        name = f"bcc-{self.name.replace('_', '-')}"
        return {
            "apiVersion": "probefleet.io/v1alpha1",
            "kind": "ProbePolicy",
            "metadata": {"name": name, "namespace": "default"},
            "spec": spec,
        }


def scripts() -> Iterator[Path]:
    """The package's commands."""
    listed = subprocess.run(["dpkg", "-L", PACKAGE], check=True, capture_output=True, text=True).stdout.split()
    yield from sorted(Path(each) for each in listed if each.startswith("/usr/sbin/") and each.endswith(SUFFIX))


def arguments() -> Mapping[str, list[str]]:
    """By the script's name."""
    lines = [each for each in (HERE / "arguments.txt").read_text().splitlines() if each and not each.startswith("#")]
    return {words[0]: words[1:] for words in map(shlex.split, lines)}


def name_of(path: Path) -> str:
    """As its manual calls it."""
    return path.name.removesuffix(SUFFIX)


def tools(facts: Path, names: Set[str]) -> list[Tool]:
    """These of them, two at a time."""
    given = arguments()
    chosen = [path for path in scripts() if name_of(path) in names]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda path: _tool(path, facts, given.get(name_of(path), [])), chosen))


def _tool(path: Path, facts: Path, given: list[str]) -> Tool:
    name = name_of(path)
    first = path.read_bytes()[:64].split(b"\n")[0]
    if b"python" not in first:
        return Tool(name, why="a shell script around another tool" if b"sh" in first else "no script of Python")
    command = [sys.executable, "-m", "tests.foreign.record_bcc", str(facts), str(path), *given]
    environment = {**os.environ, "TERM": "dumb", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Tool(name, why=f"it said nothing to BCC within {SECONDS} s")
    said, mark, told = done.stdout.rpartition(MARK)
    if not mark:
        return Tool(name, why=f"it ended: {(done.stderr or said).strip()[-160:]}")
    found = json.loads(told)
    modules = [each for each in found["modules"] if each["text"].strip()]
    if not modules:
        said = (said.strip() or done.stderr.strip()).partition("\n")[0]
        return Tool(name, why=(said or found["why"])[:160] or "it loads no program")
    module = modules[-1]
    if found["why"] and not found["why"].startswith("it ends"):
        return Tool(name, module["text"], why=f"the script ends: {found['why'][:140]}")
    if module["usdt"]:
        return Tool(name, why=f"USDT probes of {', '.join(module['usdt'])}, which is not there")
    attach = []
    for each in module["attach"]:
        target = _target(each)
        if isinstance(target, str):
            return Tool(name, module["text"], why=target)
        attach.append({"program": each["program"], **target})
    return Tool(name, module["text"], tuple({json.dumps(each): each for each in attach}.values()))


def _target(each: Mapping[str, Any]) -> dict[str, Any] | str:
    """As ``spec.attach`` writes it, or why it cannot be."""
    kind = each["kind"]
    if kind in ("kprobe", "kretprobe"):
        return {kind: {name: each[name] for name in ("function", "functions") if name in each}}
    if kind == "tracepoint":
        return {kind: {"category": each["category"], "name": each["name"]}}
    if kind == "rawTracepoint":
        return {kind: {"name": each["name"]}}
    if kind == "perfEvent":
        event = PERF_EVENTS.get((each["type"], each["config"]))
        if event is None:
            return f"a perf event of type {each['type']}, config {each['config']:#x}"
        rate = {"frequency": each["frequency"]} if each["frequency"] else {"period": each["period"]}
        return {kind: {"event": event, **rate}}
    library = each["library"]
    path = library if library.startswith("/") else next(map(str, LIBRARIES.glob(f"lib{library}.so*")), "")
    return {kind: {"path": path, "symbol": each["symbol"]}} if path else f"no library {library!r} on this machine"
