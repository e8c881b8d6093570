"""Executables that somebody else wrote are read as root: whatever they are, the agent goes on, and stays small."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
from probefleet_agent.kernel import elf_file, symbols, user_files


def test_a_fifo_or_a_device_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "usr/lib/debug/.build-id/ab/cdef0123.debug"
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="no regular file"), elf_file.open_file(path):
            pass
        assert symbols.build_id(path) == ""
    own = elf_file.Functions(*(symbols.np.zeros(0, kind) for kind in ("u8", "u8", "u4")), b"")
    assert symbols._with_debug_file(own, "abcdef0123", str(tmp_path)) is own
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/ld.so.cache")
    assert user_files._cached(str(tmp_path)) == {}


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "program"
    shutil.copy(sys.executable, path)
    with elf_file.open_file(path) as elf:
        assert len(elf.function_names()) > 100
        os.truncate(path, 4096)
        with pytest.raises(elf_file.NotElf, match="cut short"):
            elf.functions()


def test_a_file_of_holes_takes_no_memory(tmp_path: Path) -> None:
    """A terabyte of names and of notes, in a file of two pages."""
    path, huge = tmp_path / "program", 1 << 40
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0, 64, 120, 0, 64, 56, 1, 64, 2, 0)
    note = struct.pack("<IIQQQQQQ", 4, 0, 4096, 0, 0, huge, 0, 0)
    symbols_of, names = (
        struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, 4096, size, 1, 0, 0, 0) for kind, size in ((2, 24), (3, huge))
    )
    path.write_bytes(header + note + symbols_of + names)
    os.truncate(path, 4096 + huge)
    with elf_file.open_file(path) as elf:
        for read in (elf.functions, elf.build_id):
            with pytest.raises(elf_file.NotElf, match="at most"):
                read()


def test_a_link_in_a_containers_root_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel does not show the mapped file itself: an agent with few capabilities."""
    (tmp_path / "lib").symlink_to("/usr")
    monkeypatch.setattr(symbols._Wanted, "root", lambda _: str(tmp_path))
    for path, leads_to in (("/lib/bin", "/usr/bin"), ("/../../etc", "/etc")):
        wanted = symbols._Wanted(os.getpid(), symbols.Mapping(1, 2, 0, 3, path), symbols.np.zeros(0, "i8"))
        assert wanted.path() == Path(f"{tmp_path}{leads_to}")
    (tmp_path / "circle").symlink_to("/circle")
    assert symbols._Wanted(os.getpid(), symbols.Mapping(1, 2, 0, 3, "/circle"), wanted.at).key() is None
