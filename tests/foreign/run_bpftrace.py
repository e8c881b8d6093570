"""`make test-foreign`, second half: every `.bt` script of Debian's bpftrace as a policy, under the same workload.

`python -m tests.foreign.run_bpftrace [KERNEL] [--only NAME…]`: a table, and at least ``LEAST`` whose rows change.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.foreign import run_bcc

PACKAGE = "bpftrace"
LEAST = 25


def scripts() -> list[Path]:
    """The package's own."""
    listed = subprocess.run(["dpkg", "-L", PACKAGE], check=True, capture_output=True, text=True).stdout.split()
    return sorted(Path(each) for each in listed if each.endswith(".bt"))


def policy(path: Path) -> dict[str, Any]:
    """The script as it is."""
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": path.stem, "namespace": "default"},
        "spec": {"scope": "Cluster", "program": {"bpftrace": {"script": path.read_text()}}, "interval": "1s"},
    }


def main() -> int:
    """The table; 1 where too few scripts work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kernel", nargs="?", default=run_bcc.KERNEL)
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    policies = {path.stem: policy(path) for path in scripts() if not asked.only or path.stem in asked.only}
    results = run_bcc.attempt(asked.kernel, "bpftrace", policies, pickle.dumps({}))
    run_bcc.print_table([(name, results[name]) for name in policies])
    works = sum(each["state"] == "changes" for each in results.values())
    print(f"{asked.kernel}: {works} of {len(policies)} scripts of {PACKAGE} give rows that change; {LEAST} have to")
    return 0 if works >= LEAST or asked.only else 1


if __name__ == "__main__":
    sys.exit(main())
