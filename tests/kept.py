"""What a compiler made, kept for later runs in ``${XDG_CACHE_HOME:-~/.cache}/probefleet/compiled``, by digest.

The tests have some 600 texts compiled, by clang and by BCC: minutes of a CPU, for the bytes that the run before got
from the same texts. The key is all that an answer depends on, the compiler's version among it; what nobody has asked
for in a month goes. Tests of compiling itself (``test_clang``, ``test_bcc``, ``test_compilers_here``) ask nothing here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probefleet" / "compiled"
UNUSED_SECONDS = 30 * 86_400


def answer(depends_on: Iterable[bytes], make: Callable[[], bytes], *, folder: Path = FOLDER) -> bytes:
    """The bytes that were made of this before; else made now, and kept. What ``make`` raises is not kept."""
    digest = hashlib.sha256()
    for part in depends_on:
        digest.update(len(part).to_bytes(8, "little") + part)
    path = folder / digest.hexdigest()
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        found = make()
        folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(found)
        new.rename(path)  # whole at once: other workers look for it as well
    else:
        os.utime(path)
    return found


def forget_unused(folder: Path = FOLDER) -> None:
    """Remove what nobody has asked for in a month."""
    oldest = time.time() - UNUSED_SECONDS
    for path in folder.glob("*"):
        if path.is_file() and path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


@functools.cache
def contents(*folders: Path) -> bytes:
    """A digest of the files in these folders, names and all."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.digest()


@functools.cache
def compilers() -> bytes:
    """The versions of clang, of BCC's library and of libbpf's headers."""
    said = b""
    for command in (["clang", "--version"], ["dpkg-query", "-W", "-f", "${Version} ", "libbpfcc", "libbpf-dev"]):
        said += subprocess.run(command, capture_output=True, check=True).stdout
    return said
