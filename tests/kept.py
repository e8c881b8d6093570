"""What a compiler made, kept for later runs in ``${XDG_CACHE_HOME:-~/.cache}/probefleet/compiled``, by digest.

The tests have some 600 texts compiled, by clang and by BCC: minutes of a CPU, for the bytes that the run before got
from the same texts. The key is all that an answer depends on, the compiler's version among it; what nobody has asked
for in a month goes. The tests of compiling itself, marked ``compiles``, ask nothing here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from probefleet_wire.kept import digest

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probefleet" / "compiled"
UNUSED_SECONDS = 30 * 86_400


def answer(depends_on: Iterable[bytes], make: Callable[[], bytes], *, folder: Path = FOLDER) -> bytes:
    """The bytes that were made of this before; else made now, and kept. What ``make`` raises is not kept."""
    path = folder / digest(depends_on)
    try:
        found = path.read_bytes()
        os.utime(path)
    except FileNotFoundError:
        found = make()
        folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        new.write_bytes(found)
        new.rename(path)  # whole at once: other workers look for it as well
    return found


def forget_unused(folder: Path = FOLDER) -> None:
    """Remove what nobody has asked for in a month."""
    oldest = time.time() - UNUSED_SECONDS
    for path in (*folder.glob("*"), *folder.glob("headers/*")):
        with contextlib.suppress(FileNotFoundError):  # another run forgets as well
            if path.name == "headers" or path.stat().st_mtime >= oldest:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@functools.cache
def contents(*folders: Path) -> bytes:
    """A digest of the files in these folders, names and all, but for Python's own."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{path.relative_to(folder)}\0{content}\n".encode())
    return found.digest()


@functools.cache
def compilers() -> bytes:
    """The versions of clang, of BCC's library and of libbpf's headers."""
    said = b""
    for command in (["clang", "--version"], ["dpkg-query", "-W", "-f", "${Version} ", "libbpfcc", "libbpf-dev"]):
        said += subprocess.run(command, capture_output=True, check=True).stdout
    return said
