"""In a guest of `vm`, clang and BCC run on the host: what takes 15 s on an emulated CPU takes one, for the same bytes.

In the guest `install()` puts questions to the host in the compilers' place: `clang.compile_core`, and the step of
`bcc.compile` that starts BCC's child. They ask for a whole compilation, and get what the compiler printed and made.
All around it (the text that is given to BCC, the reading of its answer, loading, attaching) happens in the guest.
`Compilers` answers on the host: clang's objects are the same for every kernel; BCC compiles against the guest's BTF,
which lies in its $VM_OUT as `vmlinux`. Answers are kept in `build/compiled` by question and compiler.

Why it proves the same: a compiler sees text and types, not the kernel that it runs under. `test_compilers_here.py`
compiles in the guest as well and compares the bytes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from probefleet_agent.kernel import bcc, bcc_headers
from probefleet_wire import btf_c, clang, sandbox

from tests.kernel import support, vm_questions

ROOT = Path(__file__).parents[2]
VMLINUX = "vmlinux"
_here = (clang.compile_core, bcc._run, bcc_headers.tree, support.clang_object)


def install() -> None:
    """In a guest with somebody to ask: from now on this process's compilers are the host's."""
    if vm_questions.there():
        clang.compile_core = _compile_core
        bcc._run, bcc_headers.tree = _run_bcc, _no_tree
        support.clang_object = _clang_object


def uninstall() -> None:
    """The compilers of this machine again: for tests of how they run here."""
    clang.compile_core, bcc._run, bcc_headers.tree, support.clang_object = _here


def _ask(what: str, **words: Any) -> Any:
    answer = pickle.loads(vm_questions.ask(pickle.dumps((what, words))))
    if isinstance(answer, list):  # CompileError does not survive pickling: its diagnostics do
        raise clang.CompileError(answer)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _compile_core(source: str, *, name: str, include_dirs: Sequence[Path], **options: Any) -> clang.Compiled:
    found: clang.Compiled = _ask("core", source=source, name=name, include_dirs=list(include_dirs), **options)
    return found


def _clang_object(text: str) -> bytes:
    found: bytes = _ask("object", text=text)
    return found


def _no_tree(*_: object, **__: object) -> Path:
    return Path("/nonexistent")  # the host makes it


def _run_bcc(
    text: str, source: str, flags: Sequence[str], tree: Path, formats: Sequence[str], limits: sandbox.Limits
) -> sandbox.Finished:
    found: sandbox.Finished = _ask(
        "bcc", text=text, source=source, flags=list(flags), formats=list(formats), release=os.uname().release
    )
    return found


class Compilers:
    """The host's side: a question's bytes in, the answer's out. `out` is the guest's $VM_OUT."""

    def __init__(self, out: Path, *, kept: Path = ROOT / "build" / "compiled") -> None:
        self.out, self.kept = out, kept
        self.asked = self.compiled = 0
        kept.mkdir(parents=True, exist_ok=True)

    def __call__(self, question: bytes) -> bytes:
        """The answer, from the folder of answers if it is there."""
        self.asked += 1
        what, words = pickle.loads(question)
        known = [question, _toolchain()]
        if what == "bcc":
            known.append((self.out / VMLINUX).read_bytes())
        path = self.kept / hashlib.sha256(b"\0".join(known)).hexdigest()
        if path.exists():
            return path.read_bytes()
        self.compiled += 1
        found = self._answer(what, words)
        answer = pickle.dumps(found)
        if isinstance(found, Exception):
            return answer  # of this machine, not of the source: the next one may do better
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(answer)
        new.rename(path)
        return answer

    def _answer(self, what: str, words: dict[str, Any]) -> object:
        ways: dict[str, Callable[..., object]] = {"core": clang.compile_core, "object": support.clang_object}
        ways["bcc"] = self._bcc
        try:
            return ways[what](**words)
        except clang.CompileError as error:
            return list(error.diagnostics)
        except Exception as error:
            return RuntimeError(f"the host cannot compile it: {type(error).__name__}: {error}")

    def _bcc(self, *, release: str, text: str, source: str, flags: list[str], formats: list[str]) -> sandbox.Finished:
        types = (self.out / VMLINUX).read_bytes()
        tree = bcc_headers.tree(types, root=self.kept / "headers", release=release)
        return bcc._run(text, source, flags, tree, formats, bcc.LIMITS)


@functools.cache
def _toolchain() -> bytes:
    """Changes whenever an answer might: the headers, and the compilers and what calls them."""
    found = hashlib.sha256()
    own = [*(ROOT / "bpf/include").rglob("*"), *Path(bcc_headers.__file__).parent.iterdir(), bcc.CHILD]
    own += [Path(module.__file__ or "") for module in (clang, bcc, btf_c, sandbox, support)]
    for path in sorted(path for path in own if path.is_file()):
        found.update(path.read_bytes())
    for command in (["clang", "--version"], ["dpkg-query", "-W", "-f", "${Version} ", "libbpfcc", "libbpf-dev"]):
        found.update(subprocess.run(command, capture_output=True, check=False).stdout)
    return found.digest()
