"""`make test-foreign`, first half: every program of Debian's bpfcc-tools as a policy, on another kernel, under a stated
workload.

extract ─▶ (VM: facts) ─▶ compile here against that kernel's types ─▶ (VM: attempt) ─▶ a table, and at least ``LEAST``
whose rows change. `python -m tests.foreign.run_bcc [KERNEL] [--only NAME…]`
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from probefleet_agent.kernel import bcc, bcc_headers
from probefleet_wire import sandbox

from tests.foreign import extract

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "foreign"
LEAST = 25
KERNEL = "bookworm-backports"


def vm(kernel: str, out: Path, seconds: int, *command: str) -> None:
    """Run a command under another kernel."""
    line = [
        str(ROOT / "tests/kernel/vm"),
        "run",
        kernel,
        "--out",
        str(out),
        "--seconds",
        str(seconds),
        "--memory",
        "4G",
    ]
    subprocess.run([*line, "--", *command], check=True, cwd=ROOT)


def facts(kernel: str) -> Path:
    """What that kernel has, asked once."""
    folder = BUILD / kernel
    if not (folder / "formats").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        vm(kernel, folder, 300, str(ROOT / "tests/foreign/vm_facts.sh"))
    return folder


def formats(folder: Path) -> dict[tuple[str, str], str]:
    """(category, name) → the text of the tracepoint's format file."""
    parts = re.split(r"^==> (\S+)/(\S+)/format <==\n", (folder / "formats").read_text(), flags=re.MULTILINE)
    return {(parts[at], parts[at + 1]): parts[at + 2] for at in range(1, len(parts), 3)}


@contextlib.contextmanager
def compiled_for(folder: Path, made: dict[str, sandbox.Finished]) -> Iterator[None]:
    """While it lasts, BCC compiles for the kernel of these facts, and what it answers is kept."""
    run, tree = bcc._run, bcc_headers.tree
    release = (folder / "release").read_text().strip()

    def keep(text: str, source: str, *arguments: Any) -> sandbox.Finished:
        made[source] = run(text, source, *arguments)
        return made[source]

    bcc._run = keep
    bcc_headers.tree = functools.partial(tree, release=release)
    try:
        yield
    finally:
        bcc._run, bcc_headers.tree = run, tree


def compile_all(tools: Sequence[extract.Tool], folder: Path) -> tuple[dict[str, sandbox.Finished], dict[str, str]]:
    """Each tool's program, compiled; and why some are not."""
    made: dict[str, sandbox.Finished] = {}
    why: dict[str, str] = {}

    known = formats(folder)

    def tracepoint_format(category: str, name: str) -> str:
        if (category, name) not in known:
            raise bcc.CompileFailed(
                bcc.clang.CompileError([bcc.clang.Diagnostic("", 0, 0, "error", f"no tracepoint {category}:{name}")])
            )
        return known[category, name]

    def one(tool: extract.Tool) -> None:
        try:
            bcc.compile(
                tool.source,
                name=f"{tool.name}.c",
                vmlinux=folder / "vmlinux",
                headers_root=BUILD / "headers",
                tracepoint_format=tracepoint_format,
            )
        except (bcc.CompileFailed, bcc.BccUnavailable) as error:
            why[tool.name] = f"does not compile: {next(iter(str(error).splitlines()), '')}"

    with compiled_for(folder, made), ThreadPoolExecutor(2) as pool:
        list(pool.map(one, tools))
    return made, why


def main() -> int:
    """The table; 1 where too few programs work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kernel", nargs="?", default=KERNEL)
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    folder = facts(asked.kernel)
    tools = [each for each in extract.tools(folder) if not asked.only or each.name in asked.only]
    made, not_compiled = compile_all([each for each in tools if not each.why], folder)
    policies = {each.name: each.policy() for each in tools if not each.why and each.name not in not_compiled}
    results = attempt(asked.kernel, "bcc", policies, pickle.dumps(made))
    rows = []
    for tool in tools:
        why = tool.why or not_compiled.get(tool.name, "")
        rows.append((tool.name, {"state": "none", "why": why} if why else results[tool.policy()["metadata"]["name"]]))
    print_table(rows)
    works = sum(found["state"] == "changes" for _, found in rows)
    print(
        f"{asked.kernel}: {works} of {len(rows)} commands of {extract.PACKAGE} give rows that change; {LEAST} have to"
    )
    return 0 if works >= LEAST or asked.only else 1


def attempt(kernel: str, what: str, policies: dict[str, Any], compiled: bytes) -> dict[str, dict[str, Any]]:
    """Load all of them under that kernel, work, and say what came of each."""
    job, out = BUILD / kernel / f"{what}-job", BUILD / kernel / f"{what}-out"
    for each in (job, out):
        each.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    (job / "policies.json").write_text(json.dumps(policies))
    (job / "compiled.pickle").write_bytes(compiled)
    vm(kernel, out, 2400, sys.executable, "-m", "tests.foreign.attempt", str(job), "/run/vm/out")
    results: dict[str, dict[str, Any]] = json.loads((out / "results.json").read_text())
    return results


def print_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Name, how far it gets, and which outputs change or why none does; what works comes first."""
    words = {"changes": "works", "loads": "loads, no row changed"}
    order = ["changes", "loads", "fails", "refused", "none"]
    for name, found in sorted(rows, key=lambda row: (order.index(row[1]["state"]), row[0])):
        rest = ", ".join(found.get("outputs", [])) or found.get("why", "").split("\n")[0][:180]
        print(f"{name:20} {words.get(found['state'], 'no'):22} {rest}")


if __name__ == "__main__":
    sys.exit(main())
