"""The C of unit tests → CO-RE objects, by the machine's clang and the repository's headers.

A kernel's types take clang ten times as long as a test's own thirty lines: 0.3 s of a CPU, for each of 160 sources. So
they are read once and kept in ``build/`` as clang's precompiled header. Objects come out the same, BTF and all; clang
refuses a kept header whose vmlinux.h has changed, and its name has what it was made of. The objects are kept as well,
for other runs and other clones (``tests.kept``).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from probefleet_wire import clang

from tests import kept

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = ROOT / "bpf/include"
KEPT = ROOT / "build/tests"
_WANTS_TYPES = re.compile(r"""#include [<"](?:vmlinux|probefleet\w*)\.h[>"]""")


@functools.cache
def compiled(source: str, *, cpu: str = "v3", btf: bool = True) -> bytes:
    """The object of a source, with what it may want of ``bpf/include``."""
    flags = ("-g" if btf else "-g0", "-O2", "-target", "bpf", f"-mcpu={cpu}", "-D__TARGET_ARCH_x86")
    called_by = (Path(each).read_bytes() for each in (__file__, clang.__file__))
    depends_on = (source.encode(), " ".join(flags).encode(), *called_by, kept.contents(INCLUDE), kept.compilers())
    return kept.answer(depends_on, lambda: _object(source, (*flags, f"-I{INCLUDE}")))


def _object(source: str, flags: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        text, made = Path(folder, "x.bpf.c"), Path(folder, "x.bpf.o")
        # As compile_core gives it to a program that prints.
        text.write_text(f'#include "{clang.PRINT_HEADER}"\n#line 1\n{source}' if clang.prints(source) else source)
        types = ("-include-pch", str(_types(flags))) if _WANTS_TYPES.search(source) else ()
        _clang(*flags, *types, "-c", str(text), "-o", str(made))
        return made.read_bytes()


@functools.cache
def _types(flags: Sequence[str]) -> Path:
    """vmlinux.h as clang has read it: its form is that clang's, and one for each set of flags."""
    header = INCLUDE / "vmlinux.h"
    seen = header.stat()
    made_of = [_clang("--version"), *flags, f"{seen.st_size} {seen.st_mtime_ns}"]
    header_file = KEPT / f"vmlinux-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:16]}.pch"
    if not header_file.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        unfinished = header_file.with_suffix(f".{os.getpid()}")
        _clang(*flags, "-x", "c-header", str(header), "-o", str(unfinished))
        unfinished.rename(header_file)  # whole at once: other workers look for it as well
    return header_file


def _clang(*arguments: str) -> str:
    done = subprocess.run(["clang", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
