"""`make plugin`: a wheel that brings the catalog to a machine without this repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from probefleet_cli import sources

ROOT = Path(__file__).resolve().parents[2]


def test_a_wheel_has_the_whole_catalog_and_reads_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, f"--wheel-dir={tmp_path}", str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("probefleet-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "alone")
    # Its own packages alone: the tree, which the tests have by an editable installation, is out of sight.
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'alone')!r}); sys.meta_path = [each for each in sys.meta_path "
        "if 'editable' not in repr(each)]; from probefleet_cli import sources; "
        "print(sources.__file__); print(*sources.load_catalog().names)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    where, names = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert names.split() == list(sources.load_catalog().names)
