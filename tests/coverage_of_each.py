"""Whether each module is covered, not only all of them together: the sum hides the one that is not.

    python -m tests.coverage_of_each COVERAGE.json PERCENT

In: coverage's JSON, with branches. Out: the modules below PERCENT, a line each; status 1 where there are any.
"""

import json
import sys
from pathlib import Path


def main(report: str, percent: str) -> int:
    """Print what is below; the exit status."""
    files = json.loads(Path(report).read_text())["files"]
    covered = {name: each["summary"]["percent_covered"] for name, each in files.items()}
    below = {name: found for name, found in covered.items() if found < float(percent)}
    for name, found in sorted(below.items()):
        print(f"{name}: {found:.1f} % of its lines and branches are covered, {percent} % are asked for")
    return 1 if below or not covered else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
