"""`python -m tests.kernel.matrix run SUITE…|here`: the tests that show something, under other kernels or this one.

    run bullseye sid     boots each kernel and runs them there; build/kernels/SERIES.json says what was shown
    run here             on this machine's kernel
    record               the results of build/kernels become those of the repository, and docs/kernels.md's table
    table                the table alone
    turn                 print the suite whose turn it is today

A run fails where a test fails, and where something no longer works that the committed result has as "yes": so a test
that begins to skip itself is noticed. What is compiled in a guest is compiled by the host (`host_compilers`).
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests import kept, turns
from tests.kernel import host_compilers, vm, vm_kernels
from tests.kernel.matrix import cells, results, table, turn

ROOT = cells.ROOT
BUILD = ROOT / "build" / "kernels"
HERE = "here"
PLUGIN = "tests.kernel.matrix.plugin"
RESULT = "result.json"
NOTHING_TO_RUN = 5  # pytest's status
DAY_SECONDS = 86_400
# An emulated kernel on a machine that has other things to do.
SECONDS = 1500
TEST_SECONDS = 180
WITHOUT = "cacheprovider xdist pytest_cov hypothesispytest"  # plugins that take a guest's time
PYTEST = (sys.executable, "-m", "pytest", "-q", *(f"-pno:{name}" for name in WITHOUT.split()))


def files_with(marks: str) -> list[str]:
    """The test files with such tests. What is compiled of Python here, a guest need not compile: that takes minutes."""
    compileall = [sys.executable, "-m", "compileall", "-q", "node_agent", "operator", "protos", "tests"]
    subprocess.run(compileall, cwd=ROOT, check=True)
    command = [*PYTEST, "--collect-only", "-m", marks, "tests/kernel"]
    writing = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=writing)
    if listed.returncode:
        raise SystemExit(f"the tests cannot be collected:\n{listed.stdout}{listed.stderr}")
    files = dict.fromkeys(line.partition("::")[0] for line in listed.stdout.splitlines() if "::" in line)
    # What takes long comes last: a guest whose time is over has shown the most that it could.
    return sorted(files, key=lambda file: [word in file for word in ("compilers", "catalog", "examples")])


def run(where: str, *, only: str, rest: bool, third: bool, seconds: float) -> int:
    """The tests on one kernel; a status for the shell."""
    started = time.monotonic()
    out = BUILD / f"{where}-out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    kept.forget_unused()
    release = os.uname().release
    if where != HERE:
        release = vm_kernels.fetch(where, say=lambda line: print(f"vm: {line}", file=sys.stderr)).release
    earlier = BUILD / f"{'third-' if third else ''}{results.series(release)}.json"
    # A kernel whose turn comes every fourth day gets another third then, also where commits come in threes.
    whose_turn = turns.of_this_commit() + _today() // len(vm_kernels.SUITES)
    wanted = cells.third(whose_turn) if third else frozenset(cells.cells())
    options = [*(["-k", only] if only else []), *(["--matrix-but", str(earlier)] if rest and earlier.exists() else [])]
    options += ["--matrix-third", str(whose_turn)] if third else []
    words = ""
    if where == HERE:
        status = on_host("shows", out, options)
    else:
        compilers = host_compilers.Compilers(out / host_compilers.VMLINUX)
        status = in_guest(where, out, options, seconds=seconds, compilers=compilers)
        words = f", {compilers.asked} compilations asked of the host, {compilers.compiled} made"
    if not (out / RESULT).exists():
        return status or 1
    found = results.read_run(out / RESULT)
    if where != HERE:
        # What asks the guest's types alone needs no emulated CPU.
        status |= on_host("shows and of_types", out / "of_types", options, PROBEFLEET_TEST_BTF=str(out / "vmlinux"))
        if (out / "of_types" / RESULT).exists():
            found = found.with_tests_of(results.read_run(out / "of_types" / RESULT))
    whole = not only and not rest
    result = with_earlier(found, earlier, whole).result()
    yes = sum(result.cells[cell] == "yes" for cell in wanted)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.monotonic() - started:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of CPU so far)"
    print(f"Linux {result.release}: {yes} of {len(wanted)} rows shown, {took}{words}", flush=True)
    before = [each for each in results.committed() if each.series == result.series and not only]
    gone = [line for each in before for line in results.lost(each, result, wanted)]
    print("".join(f"{line}\n" for line in gone), end="", flush=True)
    return status or int(bool(gone))


def on_host(marks: str, out: Path, options: Sequence[str], **environment: str) -> int:
    """The tests with these marks, on this machine."""
    out.mkdir(exist_ok=True)
    command = [*PYTEST, "-p", PLUGIN, "--matrix", str(out / RESULT), "-m", marks, *options, *files_with(marks)]
    status = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, **environment}).returncode
    return 0 if status == NOTHING_TO_RUN else status


def in_guest(
    where: str, out: Path, options: Sequence[str], *, seconds: float, compilers: host_compilers.Compilers
) -> int:
    """What needs that kernel, under it; a status."""
    marks = "(shows or vm_only) and not of_types"
    command = [*PYTEST, "-p", PLUGIN, "--matrix", f"/run/vm/out/{RESULT}", "-m", marks, *options, "--durations=12"]
    command += ["-o", f"timeout={TEST_SECONDS}", *files_with(marks)]
    keep_types = f'cp /sys/kernel/btf/vmlinux "$VM_OUT/{host_compilers.VMLINUX}"; exec "$@"'
    try:
        return vm.run(
            where,
            ["sh", "-c", keep_types, "sh", *command],
            seconds=seconds,
            out=out,
            cwd=ROOT,
            environment={name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
            stdout=sys.stdout.buffer,
            stderr=sys.stderr.buffer,
            answer=compilers,
        ).returncode
    except vm.VmError as error:
        print(error, file=sys.stderr)
        return 1


def with_earlier(found: results.Run, file: Path, whole: bool) -> results.Run:
    """Into build/, with what an earlier run showed where this one was no whole one."""
    if not whole and file.exists():
        found = found.after(results.read_run(file))
    file.write_text(found.to_json())
    return found


def _today() -> int:
    return int(time.time()) // DAY_SECONDS


def record() -> None:
    """What was shown last becomes what the repository says."""
    results.FOLDER.mkdir(exist_ok=True)
    for file in sorted(BUILD.glob("[0-9]*.json")):
        (results.FOLDER / file.name).write_text(results.read_run(file).result().to_json())
    table.write()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernel.matrix")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the tests that show something")
    runs.add_argument("where", nargs="+", choices=(HERE, *vm_kernels.SUITES))
    runs.add_argument("-k", default="", help="only these tests; the others stay as they were seen last")
    runs.add_argument("--rest", action="store_true", help="only what has not passed in earlier runs of this kernel")
    runs.add_argument("--third", action="store_true", help="every third row; the others with the next commits")
    runs.add_argument("--seconds", type=float, default=SECONDS, help="stop a guest after so long (%(default)s)")
    commands.add_parser("record", help="commit what build/kernels has")
    commands.add_parser("turn", help="the suite that `make test` takes today")
    commands.add_parser("table", help="make the document's table anew")
    asked = parser.parse_args()
    os.chdir(ROOT)
    if asked.command == "run":
        how = {"only": asked.k, "rest": asked.rest, "third": asked.third, "seconds": asked.seconds}
        return max([run(where, **how) for where in asked.where])
    if asked.command == "turn":
        print(turn.suite(results.committed(), _today(), suites=vm_kernels.SUITES))
        return 0
    if asked.command == "record":
        record()
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
