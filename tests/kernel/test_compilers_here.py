"""clang and BCC run locked in on this kernel, whatever it has for it (Landlock, or namespaces alone), and give the
bytes that they give on another machine from the same text and types.

In a VM the other tests have the host compile (`host_compilers`); here the machine does, once with each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from probefleet_agent.kernel import bcc
from probefleet_wire import clang, sandbox

from tests.kernel import host_compilers, vm_questions
from tests.kernel.test_bcc import EXECS, HEADERS
from tests.kernel.test_clang import COUNTER, TREE

# An emulated CPU takes 15 s and more for what takes one elsewhere.
pytestmark = pytest.mark.timeout(600)
LIMITS = sandbox.Limits(memory_bytes=2 << 30, cpu_seconds=300, wall_seconds=500)


@contextlib.contextmanager
def this_machines() -> Iterator[None]:
    """The compilers that are here."""
    host_compilers.uninstall()
    try:
        yield
    finally:
        host_compilers.install()


@pytest.mark.shows("besides/clang")
def test_clang_is_locked_in_and_gives_the_same_bytes() -> None:
    assert sandbox.describe() != "none"
    with this_machines():
        here = clang.compile_core(COUNTER, name="slow.c", include_dirs=[TREE], limits=LIMITS)
        with pytest.raises(clang.CompileError, match="is outside the header tree"):
            clang.compile_core('#include "/etc/passwd"\n', name="slow.c", include_dirs=[TREE], limits=LIMITS)
    if vm_questions.there():
        assert clang.compile_core(COUNTER, name="slow.c", include_dirs=[TREE]).sha256 == here.sha256


@pytest.mark.shows("besides/bcc")
def test_bcc_is_locked_in_and_gives_the_same_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    with this_machines():
        here = bcc.compile(EXECS, name="execs.c", headers_root=HEADERS, timeout_seconds=500)
    assert Path(HEADERS).is_dir()
    assert [each.name for each in here.maps] == ["by_uid"]
    if vm_questions.there():
        there = bcc.compile(EXECS, name="execs.c", headers_root=HEADERS)
        assert [each.instructions for each in there.functions] == [each.instructions for each in here.functions]
        assert there.btf_bytes == here.btf_bytes
