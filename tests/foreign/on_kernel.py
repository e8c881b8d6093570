"""Foreign programs on another kernel: what that kernel has, BCC's programs compiled here against its types, and a boot
in which some of them are tried. Called by ``run``.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

from probefleet_agent.kernel import bcc, bcc_headers
from probefleet_wire import clang, sandbox

from tests import kept
from tests.foreign import extract
from tests.kernel import host_compilers

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "foreign"
#: What `vm_facts.sh` writes; the last one last.
FACTS = ("vmlinux", "release", "functions", "symbols", "tracepoints", "formats")
#: Policies, and BCC's programs compiled, by their source.
Job: TypeAlias = tuple[Sequence[dict[str, Any]], dict[str, sandbox.Finished]]


def vm(kernel: str, out: Path, seconds: int, *command: str) -> list[str]:
    """The command line that runs a command under another kernel. VM_LOCK: a file that one machine at a time holds."""
    lock = os.environ.get("VM_LOCK")
    return [
        *(["flock", lock] if lock else []),
        *(str(ROOT / "tests/kernel/vm"), "run", kernel, "--out", str(out)),
        *("--seconds", str(seconds), "--memory", "4G", "--", *command),
    ]


def known(kernel: str) -> bool:
    """Whether it has been asked what it has."""
    return (BUILD / kernel / FACTS[-1]).is_file()


def facts(kernel: str) -> Path:
    """What that kernel has, asked once."""
    folder = BUILD / kernel
    if not known(kernel):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(vm(kernel, folder, 600, str(ROOT / "tests/foreign/vm_facts.sh")), check=True, cwd=ROOT)
    return folder


def formats(folder: Path) -> dict[tuple[str, str], str]:
    """(category, name) → the text of the tracepoint's format file."""
    parts = re.split(r"^==> (\S+)/(\S+)/format <==\n", (folder / "formats").read_text(), flags=re.MULTILINE)
    return {(parts[at], parts[at + 1]): parts[at + 2] for at in range(1, len(parts), 3)}


@contextlib.contextmanager
def compiled_for(folder: Path, made: dict[str, sandbox.Finished]) -> Iterator[None]:
    """While it lasts, BCC compiles for the kernel of these facts. What it answers is kept, here and for later runs."""
    tree = bcc_headers.tree
    release = (folder / "release").read_text().strip()

    def keep(text: str, source: str, *arguments: Any) -> sandbox.Finished:
        made[source] = host_compilers.run_bcc(text, source, *arguments)
        return made[source]

    with mock.patch.object(bcc, "_run", keep), mock.patch.object(bcc_headers, "tree", partial(tree, release=release)):
        yield


def compile_all(tools: Sequence[extract.Tool], folder: Path) -> tuple[dict[str, sandbox.Finished], dict[str, str]]:
    """Each tool's program, compiled; and why some are not."""
    made: dict[str, sandbox.Finished] = {}
    why: dict[str, str] = {}

    known = formats(folder)

    def tracepoint_format(category: str, name: str) -> str:
        if (category, name) not in known:
            raise bcc.CompileFailed(
                clang.CompileError([clang.Diagnostic("", 0, 0, "error", f"no tracepoint {category}:{name}")])
            )
        return known[category, name]

    def one(tool: extract.Tool) -> None:
        try:
            bcc.compile(
                tool.source,
                name=f"{tool.name}.c",
                vmlinux=folder / "vmlinux",
                headers_root=kept.FOLDER / "headers",
                tracepoint_format=tracepoint_format,
            )
        except (bcc.CompileFailed, bcc.BccUnavailable) as error:
            why[tool.name] = f"does not compile: {next(iter(str(error).splitlines()), '')}"

    with compiled_for(folder, made), ThreadPoolExecutor(2) as pool:
        list(pool.map(one, tools))
    return made, why


def attempt(kernel: str, make_job: Callable[[Path], Job], seconds: int) -> dict[str, dict[str, Any]]:
    """Load all policies of a job under that kernel, work, and say what came of each, by its name; of those that it came
    to. ``make_job`` is given what the kernel has: the same boot tells it, where nobody has asked before.
    """
    folder, out = BUILD / kernel, BUILD / kernel / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    asks = [] if known(kernel) else ["facts"]
    command = vm(kernel, out, seconds, sys.executable, "-m", "tests.foreign.attempt", "/run/vm/out", *asks)
    with subprocess.Popen(command, cwd=ROOT) as machine:
        try:
            if asks:
                wait_for(out / "told", machine)
                for name in FACTS:
                    shutil.move(out / name, folder / name)
            policies, compiled = make_job(folder)
            (out / "policies.json").write_text(json.dumps({each["metadata"]["name"]: each for each in policies}))
            (out / "compiled.pickle").write_bytes(pickle.dumps(compiled))
            (out / "ready").touch()
            if status := machine.wait():
                print(f"the machine's command ended with {status}", file=sys.stderr)
        finally:
            machine.terminate()
    told = out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(told.read_text()) if told.is_file() else {}
    return results


def wait_for(path: Path, machine: subprocess.Popen[bytes] | None = None) -> None:
    """Until the other side has made it: files of the share tell nobody of themselves."""
    while not path.exists():
        if machine is not None and machine.poll() is not None:
            raise SystemExit(f"the machine ended with {machine.returncode} before it wrote {path.name}")
        time.sleep(0.2)
