"""`make test-foreign`: every program of Debian's bpfcc-tools and bpftrace as a policy, on another kernel, under a
stated workload.

extract, scripts ─▶ compile BCC's here, against that kernel's types ─▶ (VM: attempt, some at a time) ─▶ table

`python -m tests.foreign.run [KERNEL] [--only NAME…] [--kind bcc|bpftrace] [--tenth [TURN]] [--write]`. It ends with 1
where a program that is known to work (`docs/foreign.md`) gives nothing, or the whole has too few that do.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import turns
from tests.foreign import extract, on_kernel, scripts, table

DOCUMENT = on_kernel.ROOT / "docs" / "foreign.md"
KERNEL = "bookworm-backports"
#: So many in one boot: eight minutes or so, on a busy machine.
IN_ONE_BOOT = 60
SECONDS = 1200
Key = tuple[str, str]


def _keys() -> list[Key]:
    return [("bcc", extract.name_of(path)) for path in extract.scripts()] + [
        ("bpftrace", path.stem) for path in scripts.scripts()
    ]


def _version(package: str) -> str:
    command = ["dpkg-query", "-W", "-f=${Version}", package]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _make_job(folder: Path, *, keys: Sequence[Key], without: dict[Key, dict[str, Any]]) -> on_kernel.Job:
    """Policies of all that have a program, and BCC's compiled; ``without`` is told why the others have none."""
    tools = extract.tools(folder, {name for kind, name in keys if kind == "bcc"})
    made, not_compiled = on_kernel.compile_all([each for each in tools if not each.why], folder)
    without |= {("bcc", each.name): {"state": "none", "why": each.why} for each in tools if each.why}
    without |= {("bcc", name): {"state": "fails", "why": why} for name, why in not_compiled.items()}
    policies = [each.policy() for each in tools if ("bcc", each.name) not in without]
    policies += [scripts.policy(path) for path in scripts.scripts() if ("bpftrace", path.stem) in keys]
    return policies, made


def attempt(kernel: str, keys: Sequence[Key], *, in_one_boot: int) -> list[table.Row]:
    """Try these; a row for each. Few need one boot, which also tells what the kernel has."""
    without: dict[Key, dict[str, Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    made: list[on_kernel.Job] = []

    def make_job(folder: Path) -> on_kernel.Job:
        made.append(_make_job(folder, keys=keys, without=without))
        return made[0]

    def boot(job: Callable[[Path], on_kernel.Job]) -> None:
        began = time.monotonic()
        results.update(on_kernel.attempt(kernel, job, SECONDS))
        print(f"a boot of {time.monotonic() - began:.0f} s", flush=True)

    if len(keys) <= in_one_boot:
        boot(make_job)
    else:
        policies, compiled = make_job(on_kernel.facts(kernel))
        boots = -(-len(policies) // in_one_boot)
        for at in range(boots):
            # Of both kinds alike: a boot of scripts alone takes longer than one of compiled programs.
            boot(functools.partial(_given, (policies[at::boots], compiled)))
    policies, compiled = made[0]
    left = [each for each in policies if each["metadata"]["name"] not in results]
    if left:
        # An emulated kernel may panic while it patches itself: that says nothing of those that it did not come to.
        print("once more:", *(each["metadata"]["name"] for each in left), flush=True)
        boot(functools.partial(_given, (left, compiled)))
    rows = []
    for kind, name in keys:
        found = without.get((kind, name)) or results.get(f"{kind}-{name.replace('_', '-')}")
        rows.append(
            table.row(kind, name, found or {"state": "late", "why": "the emulated kernel ended before it came to it"})
        )
    return rows


def _given(job: on_kernel.Job, _: Path) -> on_kernel.Job:
    return job


def main() -> int:
    """The table; 1 where something that worked does not, or too few do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kernel", nargs="?", default=KERNEL)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--kind", choices=sorted(table.PACKAGES))
    parser.add_argument("--tenth", nargs="?", type=int, const=-1)
    parser.add_argument("--in-one-boot", type=int, default=IN_ONE_BOOT)
    parser.add_argument("--write", action="store_true", help=f"put what is found into {DOCUMENT.name}")
    asked = parser.parse_args()
    keys = [key for key in _keys() if asked.kind in (None, key[0]) and (not asked.only or key[1] in asked.only)]
    if asked.tenth is not None:
        turn = (turns.of_this_commit() if asked.tenth < 0 else asked.tenth) % 10
        keys = table.tenth(keys, turn)
        print(f"tenth {turn}: {', '.join(name for _, name in keys)}")
    known = table.read(DOCUMENT.read_text()) if DOCUMENT.is_file() else []
    rows = attempt(asked.kernel, keys, in_one_boot=asked.in_one_boot)
    for each in rows:
        print(f"{each.kind:9}{each.name:16}{each.state:6} {each.words}")
    whole = not asked.only and asked.tenth is None
    judged = not asked.write and asked.kernel == KERNEL
    bad = table.broken(rows, known) if judged else []
    if bad:
        # As tests of this project are: what a busy machine delayed once is not what is looked for.
        print("once more:", *(each.name for each in bad), flush=True)
        again = attempt(asked.kernel, [(each.kind, each.name) for each in bad], in_one_boot=asked.in_one_boot)
        rows = table.renewed(rows, again)
        bad = table.broken(again, known)
    for each in bad:
        print(f"known to work, and does not: {each.kind} {each.name}: {each.words or each.state}")
    failed = bool(bad)
    if late := [each.name for each in rows if each.state == "late"]:
        print(f"not tried, for the emulated kernel ended twice before it came to them: {', '.join(late)}")
    for kind, (works, every) in table.counts(rows).items():
        print(f"{asked.kernel}: {works} of {every} of {table.PACKAGES[kind]} give rows that change")
        failed = failed or (whole and works < table.LEAST)
    if asked.write:
        release = (on_kernel.facts(asked.kernel) / "release").read_text().strip()
        versions = {package: _version(package) for package in table.PACKAGES.values()}
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        everything = table.renewed(known, rows)
        DOCUMENT.write_text(table.document(everything, release=release, versions=versions, date=today))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
