"""C in, a CO-RE object out: clang in the sandbox, and its diagnostics in words that point into the policy.

``compile_core`` is called by the operator's toolchain (policies with ``program.c``) and by ``probefleet check`` and
``run``. What the choices are, and why:

- The compiler sees a file system that consists of the header tree and the source (``-ivfsoverlay`` without
  fallthrough), in a sandbox that cannot open anything else either: ``#include`` of a host file is "not found" whether
  it exists or not, ``.incbin`` (which goes past the overlay) fails on the sandbox.
- ``<bpf/*.h>`` is taken from libbpf's headers where the distribution has them; nothing else of /usr/include is there,
  since the types come from ``vmlinux.h``.
- The target is BPF with ``-mcpu=v3`` (Linux 5.10 has it), the same as the catalog's Makefile. ``arch`` only decides
  which registers PT_REGS_PARM1 means.
- A text that prints (``bpf_printk``, ``bpf_trace_printk``) is given ``probefleet_print.h`` first, if the header tree
  has it: its lines go into a ring of its own, not into the trace_pipe that all programs share.
- The same source gives the same bytes, on any machine with the same clang: no paths, no ident, no build directory.
  Digests of objects are what nodes agree on.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from probefleet_wire import elf, elf_strip, sandbox

MAX_SOURCE_BYTES = 512 << 10
MAX_TEXT_BYTES = 4096
LIBBPF_HEADERS = Path("/usr/include/bpf")
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
FLAGS = (
    *("-g", "-O2", "-std=gnu11", "-target", "bpf", "-mcpu=v3", "-nostdinc"),
    *("-Wall", "-Wno-unused-function", "-Wno-missing-declarations"),
    *("-Wno-address-of-packed-member", "-Wno-sign-compare"),
    *("-fno-ident", "-fno-crash-diagnostics", "-ferror-limit=20", "-fmacro-backtrace-limit=4"),
    "-fdebug-compilation-dir=.",
)

_PLACE = re.compile(
    r"^(?P<file>[^:\n]+):(?P<line>\d+):(?P<column>\d+): (?P<kind>fatal error|error|warning): (?P<text>.*)$"
)
_BARE = re.compile(r"^(?:clang[^:]*: )?(?P<kind>fatal error|error): (?P<text>.*)$")
_HOST_FILE = re.compile(r"^'(?P<path>[^']*)' file not found|^cannot open file '(?P<opened>[^']*)'")
_INCBIN = re.compile(r"Could not find (?P<how>incbin|include) file '(?P<path>[^']*)'")
_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_PRINTS = re.compile(r"\bbpf_(?:trace_)?printk\s*\(")
PRINT_HEADER = "probefleet_print.h"


class ClangError(RuntimeError):
    """clang could not be run at all: it is missing, or this machine cannot lock it in."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One error or warning; ``excerpt`` is the source line and the caret, as clang prints them."""

    file: str
    line: int  #: 0 where clang knows no place
    column: int
    kind: str
    text: str
    excerpt: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}: " if self.line else f"{self.file}: "
        return f"{place}{self.kind}: {self.text}" + (f"\n{self.excerpt}" if self.excerpt else "")


class CompileError(ValueError):
    """The source does not compile. ``str()`` is what to show the user: bounded, with carets; ``diagnostics`` all.

    ``lasting``: the same source will be refused again. Not so where time ran out, which a machine with less to do has.
    """

    def __init__(self, diagnostics: Sequence[Diagnostic], *, lasting: bool = True) -> None:
        self.diagnostics = tuple(diagnostics)
        self.lasting = lasting
        super().__init__(_trimmed(self.diagnostics))


@dataclass(frozen=True, slots=True)
class Compiled:
    """An object, its digest, and what clang would rather have written otherwise."""

    object: bytes
    sha256: str
    warnings: tuple[Diagnostic, ...]
    seconds: float
    peak_bytes: int = field(default=0, compare=False)


def compile_core(
    source: str,
    *,
    name: str,
    include_dirs: Sequence[Path],
    arch: str | None = None,
    clang: str = "clang",
    limits: sandbox.Limits = sandbox.DEFAULT_LIMITS,
) -> Compiled:
    """Compile libbpf's C (CO-RE). ``name`` is what diagnostics call the source, such as ``slow.c``.

    ``include_dirs`` is the header tree (``bpf/include``, with vmlinux.h); libbpf's headers are added. ``arch`` is as
    ``uname -m`` calls it. Blocks for 0.1 to 1 s. Raises ``CompileError`` for the user's mistakes, ``ClangError`` and
    ``sandbox.SandboxUnavailable`` for this machine's.
    """
    file_name = _NAME.sub("-", name)[:100] or "policy.c"
    if len(source.encode()) > MAX_SOURCE_BYTES:
        raise CompileError([_general(file_name, f"the source has more than {MAX_SOURCE_BYTES >> 10} KiB")])
    machine = ARCHITECTURES.get(arch or platform.machine())
    if machine is None:
        raise ClangError(f"machines of kind {arch or platform.machine()} are not supported: x86_64 and aarch64 are")
    tool = _find(clang)
    trees = [tree.resolve() for tree in include_dirs]
    headers = [LIBBPF_HEADERS] if LIBBPF_HEADERS.is_dir() else []
    with tempfile.TemporaryDirectory(prefix="probefleet-clang-") as folder:
        scratch = Path(folder).resolve()
        (scratch / file_name).write_text(source)
        (scratch / "overlay.json").write_text(_overlay([scratch, *trees, *headers]))
        includes = [*trees, *(tree.parent for tree in headers)]
        command: list[str | Path] = [tool, *FLAGS, f"-D__TARGET_ARCH_{machine}", "-ivfsoverlay", "overlay.json"]
        command += [f"-ffile-prefix-map={tree}/=" for tree in [*includes, scratch]]
        command += [f"-I{tree}" for tree in includes]
        if prints(source) and any((tree / PRINT_HEADER).is_file() for tree in trees):
            command += ["-include", PRINT_HEADER]
        command += ["-c", file_name, "-o", "object.o"]
        grants = sandbox.Grants(scratch, (tool, *trees, *headers))
        finished = sandbox.run(command, grants=grants, limits=limits)
        made = scratch / "object.o"
        data = made.read_bytes() if finished.status == 0 and made.is_file() and not made.is_symlink() else b""
    prefixes = [f"{tree}/" for tree in [scratch, *includes]]
    diagnostics = read_diagnostics(
        finished.stderr.decode("utf-8", "replace"), file_name, source, prefixes, _headers([*trees, *headers])
    )
    errors = [each for each in diagnostics if each.kind != "warning"]
    if finished.limit:
        errors.append(_general(file_name, limit_words(finished, limits)))
    if errors:
        raise CompileError(errors, lasting=finished.limit != "wall")
    try:
        # Two thirds and more of it are for debuggers; every node gets it.
        data = elf_strip.without_debug(data) if data else data
    except elf.ElfError as error:
        raise CompileError([_general(file_name, f"clang made an object that cannot be read: {error}")]) from error
    if not data:
        tail = finished.stderr[-400:].decode("utf-8", "replace").strip()
        raise CompileError([_general(file_name, f"clang ended with status {finished.status} and no object: {tail}")])
    return Compiled(data, hashlib.sha256(data).hexdigest(), diagnostics, finished.seconds, finished.peak_bytes)


def prints(source: str) -> bool:
    """Whether a program's text calls bpf_printk() or bpf_trace_printk()."""
    return _PRINTS.search(_COMMENT.sub(" ", source)) is not None


def _find(clang: str) -> Path:
    found = shutil.which(clang)
    if found is None:
        raise ClangError(f"{clang} is not installed (Debian: apt install clang); it compiles policies that bring C")
    return Path(found).resolve()


def _overlay(trees: Sequence[Path]) -> str:
    """A virtual file system that holds these trees at their own places and nothing else."""
    roots = [{"type": "directory-remap", "name": str(tree), "external-contents": str(tree)} for tree in trees]
    return json.dumps({"version": 0, "case-sensitive": "true", "fallthrough": "false", "roots": roots})


def read_diagnostics(
    text: str, file_name: str, source: str, prefixes: Sequence[str], headers: str = "the kernel's types and <bcc/*.h>"
) -> tuple[Diagnostic, ...]:
    """Diagnostics from clang's text, host paths cut off; ``headers`` says in words what may be included."""
    for prefix in prefixes:
        text = text.replace(prefix, "")
    found: list[Diagnostic] = []
    excerpt: list[str] | None = None
    for line in text.splitlines():
        place, bare = _PLACE.match(line), _BARE.match(line)
        if place is not None:
            where, number, column = place["file"], int(place["line"]), int(place["column"])
            excerpt = []
            if where == "<inline asm>":
                # Of asm outside functions clang only knows the assembler's line.
                where, number, column, excerpt = file_name, _asm_line(source, place["text"]), 1, None
            kind = "error" if "error" in place["kind"] else "warning"
            found.append(Diagnostic(where, number, column, kind, _words(place["text"], headers)))
        elif bare is not None:
            if "emitted" not in bare["text"] and "frontend command failed" not in bare["text"]:
                found.append(_general(file_name, _words(bare["text"], headers)))
            excerpt = None
        elif excerpt is not None:
            # The source line and the caret directly follow their diagnostic; notes and stack dumps do not interest.
            excerpt.append(line)
            if len(excerpt) == 2:
                found[-1] = replace(found[-1], excerpt="\n".join(excerpt))
                excerpt = None
    return tuple(found)


def _asm_line(source: str, text: str) -> int:
    """The line of the source that names the file of an assembler's message; 0 where there is none."""
    host = _INCBIN.search(text)
    lines = source.splitlines() if host else []
    return next((index for index, line in enumerate(lines, 1) if host and host["path"] in line), 0)


def _words(text: str, headers: str) -> str:
    """clang's words, but for files of the host, where it only says "not found"."""
    host = _HOST_FILE.match(text)
    path = (host["path"] or host["opened"]) if host else ""
    if path.startswith("/") or ".." in path.split("/"):
        return f"#include of a host file: {path} is outside the header tree; only {headers} may be included"
    if host:
        return f"'{path}' is not in the header tree; there are {headers} (kernel types are all in vmlinux.h)"
    asm = _INCBIN.search(text)
    if asm:
        return f".{asm['how']} of a host file: {asm['path']} is outside the header tree; assembly may read no files"
    return text


def _headers(trees: Sequence[Path]) -> str:
    found = {each.name for tree in trees if tree.name != "bpf" for each in tree.glob("*.h")} - {PRINT_HEADER}
    names = sorted(f"<{each}>" for each in found)
    return ", ".join(names[:8]) + (" and " if names else "") + "<bpf/*.h>"


def limit_words(finished: sandbox.Finished, limits: sandbox.Limits) -> str:
    """Which limit ended a compiler, for the person whose source did it."""
    words = {
        "memory": f"the compiler needed more than {limits.memory_bytes >> 20} MiB of memory",
        "cpu": f"the compiler took more than {limits.cpu_seconds} s",
        "wall": f"the compiler took more than {limits.wall_seconds:g} s",
        "output": f"the compiler printed more than {limits.output_bytes >> 10} KiB",
        "file": f"the object has more than {limits.file_bytes >> 20} MiB",
    }
    return words[finished.limit] + " and was stopped: is there a macro or an #include that grows without end?"


def _general(file_name: str, text: str) -> Diagnostic:
    return Diagnostic(file_name, 0, 0, "error", text)


def _trimmed(diagnostics: Sequence[Diagnostic]) -> str:
    """As many as fit; a status condition holds 32 KB and a person reads three."""
    lines: list[str] = []
    used = 0
    for index, each in enumerate(diagnostics):
        text = str(each)
        if lines and used + len(text) > MAX_TEXT_BYTES:
            lines.append(f"… and {len(diagnostics) - index} more")
            break
        lines.append(text[:MAX_TEXT_BYTES])
        used += len(lines[-1])
    return "\n".join(lines)
