"""Who compiles in kernel tests. In a guest of `vm`, the host: what takes 15 s on an emulated CPU takes one there, for
the same bytes; and what it compiled before it keeps (`tests.kept`), for guests and for its own tests. The tests of
compiling itself, marked `compiles`, are given nothing that was kept, but in a guest.

`install()` puts questions in the compilers' place: `clang.compile_core`, the step of `bcc.compile` that starts BCC's
child, and `support.clang_object`. They ask for a whole compilation, and get what the compiler printed and made. All
around it (the text that is given to BCC, the reading of its answer, loading, attaching) happens where the test runs.
`Compilers` answers on the host: clang's objects are the same for every kernel; for a guest, BCC compiles against its
BTF, which lies in its $VM_OUT as `vmlinux`.

Why it proves the same: a compiler sees text and types, not the kernel that it runs under. `test_compilers_here.py`
compiles in the guest as well and compares the bytes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from probefleet_agent.kernel import bcc, bcc_headers
from probefleet_wire import clang, sandbox

from tests import kept
from tests.kernel import support, vm_questions

ROOT = Path(__file__).parents[2]
VMLINUX = "vmlinux"
_ERROR_WITH_LINE = re.compile(rb":\d+:\d+: (?:fatal )?error: ")
REAL = SimpleNamespace(
    core=clang.compile_core, bcc=bcc._run, bcc_tree=bcc_headers.tree, clang_object=support.clang_object
)


def install() -> None:
    """From now on this process's compilers are the host's, in a guest; and on the host, what they made is kept."""
    support.clang_object = _clang_object
    clang.compile_core, bcc._run = _compile_core, run_bcc
    if vm_questions.there():
        bcc_headers.tree = _no_tree


def uninstall() -> None:
    """The compilers of this machine again: for tests of how they run here."""
    clang.compile_core, support.clang_object = REAL.core, REAL.clang_object
    bcc._run, bcc_headers.tree = REAL.bcc, REAL.bcc_tree


def _ask(what: str, **words: Any) -> Any:
    question = pickle.dumps((what, words))
    answer = pickle.loads(vm_questions.ask(question) if vm_questions.there() else _this_machines().answer(question))
    if isinstance(answer, _Mistake):
        raise clang.CompileError(answer.diagnostics, lasting=answer.lasting)
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


def run_bcc(
    text: str, source: str, flags: Sequence[str], tree: Path, formats: Sequence[str], limits: sandbox.Limits
) -> sandbox.Finished:
    """`bcc._run`, answered from what was kept."""
    # A guest's types lie with the host, which makes the tree; here it is made, for this kernel or as a test wants it.
    here = {"release": os.uname().release} if vm_questions.there() else {"tree": tree, "limits": limits}
    found: sandbox.Finished = _ask("bcc", text=text, source=source, flags=list(flags), formats=list(formats), **here)
    return found


@dataclass(frozen=True)
class _Mistake:
    """A CompileError, which does not survive pickling."""

    diagnostics: tuple[clang.Diagnostic, ...]
    lasting: bool


class _ForNow(Exception):
    """An answer that is not kept: of a limit that was reached, of a disk that was full."""


class Compilers:
    """The host's side: a question's bytes in, the answer's out. `types` is the BTF that BCC compiles against."""

    def __init__(self, types: Path, *, folder: Path = kept.FOLDER) -> None:
        self.types, self.folder = types, folder
        self.asked = self.compiled = 0

    def __call__(self, question: bytes) -> bytes:
        """The answer for a guest, which is told as well what this machine cannot do."""
        try:
            return self.answer(question)
        except Exception as error:  # of this machine, not of the source: the next time may do better
            return pickle.dumps(RuntimeError(f"the host cannot compile it: {type(error).__name__}: {error}"))

    def answer(self, question: bytes) -> bytes:
        """The answer, as it was kept if it was. Raises what the compilers raise, but for mistakes in the source."""
        self.asked += 1
        what, words = pickle.loads(question)
        # clang's headers count by what is in them: each clone has them in a place of its own. The name of BCC's place
        # says what is in them, and the place stands in what BCC says.
        told = {name: value for name, value in words.items() if name != "include_dirs"}
        depends_on = [pickle.dumps((what, sorted(told.items()))), _toolchain()]
        depends_on += [kept.contents(folder) for folder in words.get("include_dirs", ())]
        if what == "bcc":
            types = [] if "tree" in words else [self.types]
            depends_on += [path.read_bytes() for path in (*types, *bcc.CPUS)]
        try:
            return kept.answer(depends_on, lambda: self._made(what, words), folder=self.folder)
        except _ForNow as now:
            found: bytes = now.args[0]
            return found

    def _made(self, what: str, words: dict[str, Any]) -> bytes:
        found = self._answer(what, words)
        if not _lasts(found):
            raise _ForNow(pickle.dumps(found))
        return pickle.dumps(found)

    def _answer(self, what: str, words: dict[str, Any]) -> object:
        self.compiled += 1
        ways: dict[str, Callable[..., object]] = {"core": REAL.core, "object": REAL.clang_object, "bcc": self._bcc}
        try:
            return ways[what](**words)
        except clang.CompileError as error:
            return _Mistake(error.diagnostics, error.lasting)

    def _bcc(
        self,
        *,
        text: str,
        source: str,
        flags: list[str],
        formats: list[str],
        tree: Path | None = None,
        limits: sandbox.Limits = bcc.LIMITS,
        release: str = "",
    ) -> sandbox.Finished:
        if tree is None:
            tree = REAL.bcc_tree(self.types.read_bytes(), root=self.folder / "headers", release=release)
        answer: sandbox.Finished = REAL.bcc(text, source, flags, tree, formats, limits)
        return answer


def _lasts(found: object) -> bool:
    """It is what the source says and not how the machine was: what was made, or a mistake that has its line."""
    if isinstance(found, _Mistake):
        return found.lasting and any(each.line for each in found.diagnostics)
    if isinstance(found, sandbox.Finished) and (found.status or found.limit):
        return not found.limit and found.status > 0 and _ERROR_WITH_LINE.search(found.stderr) is not None
    return True


@functools.cache
def _this_machines() -> Compilers:
    return Compilers(Path("/sys/kernel/btf/vmlinux"))


@functools.cache
def _toolchain() -> bytes:
    """Changes whenever an answer might: the headers, and the compilers and what calls them and reads what they made."""
    agent, wire = Path(bcc.__file__).parent, Path(clang.__file__).parent
    own = [*sorted(agent.glob("*bcc*.py")), bcc.CHILD, *sorted(wire.glob("*.py")), Path(support.__file__)]
    called_by = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in own)
    return kept.contents(ROOT / "bpf/include", Path(bcc_headers.__file__).parent) + called_by + kept.compilers()
