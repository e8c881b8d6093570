"""Foreign programs on another kernel: what that kernel has, BCC's programs compiled here against its types, and a boot
in which some of them are tried. Called by ``run``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
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
from tests.kernel import host_compilers, vm_kernels

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "foreign"
#: Asks a kernel what it has.
ASKS = ROOT / "tests/foreign/vm_facts.sh"
#: What that writes; the last one last.
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


def facts_folder(kernel: str) -> Path:
    """Where it is kept what that kernel has, if it was asked: beside the kernel, so that a newer one is asked anew."""
    asked = hashlib.sha256(ASKS.read_bytes()).hexdigest()[:12]
    return vm_kernels.find(kernel).folder / f"facts-{asked}"


def keep_facts(kernel: str, told: Path) -> Path:
    """What was told in this folder is kept; where."""
    folder = facts_folder(kernel)
    new = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
    for name in FACTS:
        shutil.copy(told / name, new)
    try:
        new.rename(folder)
    except OSError:
        shutil.rmtree(new)
        if not folder.is_dir():  # another run may have been the first: what it was told is the same
            raise
    return folder


def facts(kernel: str) -> Path:
    """What that kernel has, asked once."""
    folder = facts_folder(kernel)
    if folder.is_dir():
        return folder
    told = BUILD / kernel / "told"
    told.mkdir(parents=True, exist_ok=True)
    subprocess.run(vm(kernel, told, 600, str(ASKS)), check=True, cwd=ROOT)
    return keep_facts(kernel, told)


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
    folder, out = facts_folder(kernel), BUILD / kernel / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    asks = [] if folder.is_dir() else ["facts"]
    command = vm(kernel, out, seconds, sys.executable, "-m", "tests.foreign.attempt", "/run/vm/out", *asks)
    with subprocess.Popen(command, cwd=ROOT) as machine:
        try:
            if asks:
                wait_for(out / "told", machine)
                keep_facts(kernel, out)
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
