"""Stacks get names: the kernel's, and a process's through its own files. What has none is counted."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from probefleet_agent.kernel import elf_file, features, links, maps, symbols, syscall
from probefleet_agent.kernel.uapi import ProgramType

from tests.kernel.support import Loaded, attachment, call_getppid, wait_until

SOURCE = """
struct pair { s32 kernel; s32 user; };
struct { __uint(type, BPF_MAP_TYPE_STACK_TRACE); __uint(max_entries, 1024); __uint(key_size, 4);
	__uint(value_size, 127 * 8); } stacks SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1024); __type(key, struct pair); __type(value, u64); }
counts SEC(".maps");
static __always_inline int take(void *ctx)
{
	struct pair pair = {};
	u64 one = 1, *count;
	if (!ours())
		return 0;
	pair.kernel = bpf_get_stackid(ctx, &stacks, 0);
	pair.user = bpf_get_stackid(ctx, &stacks, BPF_F_USER_STACK);
	count = bpf_map_lookup_elem(&counts, &pair);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&counts, &pair, &one, BPF_ANY);
	return 0;
}
"""
BY_TRACEPOINT = SOURCE + 'SEC("raw_tracepoint/sys_enter") int on_it(void *ctx) { return take(ctx); }'
BY_CLOCK = SOURCE + 'SEC("perf_event") int on_it(void *ctx) { return take(ctx); }'
BUSY_PROGRAM = """
#include <unistd.h>
volatile unsigned long turns;
__attribute__((noinline)) void probefleet_innermost(void) { for (int i = 0; i < 1000; i++) turns++; }
__attribute__((noinline)) void probefleet_middle(void) { probefleet_innermost(); turns++; }
int main(void) { write(1, "", 1); for (;;) probefleet_middle(); }
"""


def stacks(loaded: Loaded) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(count, kernel addresses, user addresses) of every pair of stacks."""
    info = maps.info(loaded.maps["stacks"])
    keys, values = loaded.rows("counts")
    pairs = np.ascontiguousarray(keys).view("<i4").reshape(-1, 2)
    counts = np.ascontiguousarray(values).view("<u8").ravel().tolist()
    result = []
    for (kernel, user), count in zip(pairs.tolist(), counts, strict=True):
        found = []
        for number in (kernel, user):
            if number < 0:
                found.append(np.empty(0, np.uint64))
                continue
            rows, there = maps.lookup_many(
                loaded.maps["stacks"], info, np.array([number], "<u4").view(np.uint8).reshape(1, 4)
            )
            assert there.all()
            addresses = rows.view("<u8").ravel()
            found.append(addresses[addresses != 0])
        result.append((count, *found))
    return result


def test_stacks_of_a_busy_program_name_its_functions_and_their_order(tmp_path: Path) -> None:
    """Compiled with frame pointers: innermost, middle, main, and libc's start beneath them."""
    binary = tmp_path / "busy"
    command = ["clang", "-O1", "-fno-omit-frame-pointer", "-fno-inline", "-x", "c", "-", "-o", str(binary)]
    subprocess.run(command, input=BUSY_PROGRAM, text=True, check=True)
    with subprocess.Popen([str(binary)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1), "the loader is through: it is in main"
            target = attachment("on_it", perf_event={"event": "cpu-clock", "frequency_hz": 997})
            with Loaded(BY_CLOCK, pid=process.pid) as loaded, links.attach(loaded.programs["on_it"], target):
                wait_until(lambda: sum(count for count, _, _ in stacks(loaded)) >= 23)
                found = stacks(loaded)
            symbolizer = symbols.Symbolizer()
            named = [(count, symbolizer.user(process.pid, user)) for count, _, user in found if len(user)]
        finally:
            process.kill()
    innermost = ["probefleet_innermost", "probefleet_middle", "main"]
    assert any(names[:3] == innermost for _, names in named), named
    # A sample of a function's first instructions, before its frame is there, leaves out who called it.
    assert all("main" in names or names[0] == "probefleet_middle" for _, names in named), named
    assert symbolizer.resolved > 0


@pytest.mark.shows("map/stack-trace")
def test_kernel_stacks_begin_where_the_program_was_called() -> None:
    with Loaded(BY_TRACEPOINT) as loaded:
        with links.attach(loaded.programs["on_it"], attachment("on_it", raw_tracepoint={"name": "sys_enter"})):
            call_getppid(23)
        names = [name for _, kernel, _ in stacks(loaded) for name in symbols.Symbolizer().kernel(kernel)]
    assert any(name.startswith("do_syscall_64") or "invoke_syscall" in name for name in names), names
    assert any("entry_SYSCALL_64" in name or "el0" in name for name in names), names


def test_a_librarys_function_is_named_by_its_address() -> None:
    libc = ctypes.CDLL("libc.so.6")
    address = ctypes.cast(libc.labs, ctypes.c_void_p).value or 0
    symbolizer = symbols.Symbolizer()
    assert symbolizer.user(os.getpid(), np.array([address, address + 1], np.uint64))[0] in ("labs", "imaxabs", "llabs")
    assert (symbolizer.resolved, symbolizer.unknown) == (2, 0)


def test_what_cannot_be_named_is_counted() -> None:
    symbolizer = symbols.Symbolizer()
    assert symbolizer.user(os.getpid(), np.array([1, 2], np.uint64)) == [symbols.UNKNOWN] * 2
    assert symbolizer.user(2**22 + 1, np.array([1], np.uint64)) == [symbols.UNKNOWN]
    assert symbolizer.kernel(np.array([5], np.uint64)) == [symbols.UNKNOWN]
    assert (symbolizer.resolved, symbolizer.unknown) == (0, 4)


def test_a_deleted_program_is_still_named(tmp_path: Path) -> None:
    """Its file is reached through /proc/PID/map_files."""
    binary = tmp_path / "gone"
    command = ["clang", "-O1", "-fno-inline", "-x", "c", "-", "-o", str(binary)]
    subprocess.run(command, input=BUSY_PROGRAM, text=True, check=True)
    with elf_file.open_file(binary) as elf:
        offset = elf.file_offset("probefleet_middle")
    assert offset is not None
    with subprocess.Popen([str(binary)], stdout=subprocess.DEVNULL) as process:
        try:
            maps = Path(f"/proc/{process.pid}/maps")
            # execve closes Popen's pipe before it maps the file.
            wait_until(lambda: str(binary) in maps.read_text())
            binary.unlink()
            mapping = next(each for each in symbols.executable_mappings(maps.read_text()) if "gone" in each.path)
            address = mapping.start + offset - mapping.offset
            assert symbols.Symbolizer().user(process.pid, np.array([address], np.uint64)) == ["probefleet_middle"]
        finally:
            process.kill()


def test_symbols_of_a_file_come_with_its_offsets(tmp_path: Path) -> None:
    with elf_file.open_file(Path(sys.executable).resolve()) as elf:
        names = elf.function_names()
        assert "main" in names or "_start" in names or "Py_Main" in names
        assert elf.file_offset("no_such_function_at_all") is None
    assert len(symbols.build_id(Path("/proc/self/exe"))) in (0, 40)
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with pytest.raises(elf_file.NotElf, match="empty"), elf_file.open_file(empty):
        pass


@pytest.mark.parametrize("cut", [4, 40, 64, 1000, 5000])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    whole = Path("/bin/true").resolve().read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(whole[:cut])
    with pytest.raises(elf_file.NotElf), elf_file.open_file(path) as elf:
        elf.functions()


def test_kallsyms_know_functions_and_aliases() -> None:
    parsed = symbols.parse_kallsyms(
        b"ffffffff81000000 T _text\nffffffff81000000 T _stext\nffffffff81000010 t helper.isra.0\n"
        b"ffffffff81000020 D data\nffffffff81000040 T _etext\nffffffffc0000000 t in_module\t[nf]\n"
        b"ffffffffc0000800 t bpf_prog_6deef7357e7b4530_run\t[bpf]\n",
        "nf 1024 1 - Live 0xffffffffc0000000\nother 4096 0 - Live 0xffffffffc0100000 (E)\n",
    )
    assert {"_text", "_stext", "helper.isra.0", "in_module"} < parsed.functions()
    named = {
        0xFFFFFFFF81000008: "_text",
        0xFFFFFFFF81000010: "helper.isra.0",
        0xFFFFFFFF81000041: symbols.UNKNOWN,  # behind the kernel's text
        0xFFFFFFFFC0000004: "in_module",
        0xFFFFFFFFC0000400: symbols.UNKNOWN,  # behind the module
        0xFFFFFFFFC0000804: "bpf_prog_6deef7357e7b4530_run",
        0xFFFFFFFFC0100000: symbols.UNKNOWN,  # a module without symbols, far from the program
        0x10: symbols.UNKNOWN,
    }
    addresses = np.array([*named], np.uint64)
    assert parsed.resolve(addresses) == [*named.values()]
    passing = {at for at, name in named.items() if name.startswith((symbols.UNKNOWN, "bpf_prog"))}
    assert parsed.passing(addresses) == passing, "a program may come there, or go"
    assert symbols.parse_kallsyms(b"0000000000000000 T _text\n").resolve(addresses) == [symbols.UNKNOWN] * 8


def test_a_program_that_is_loaded_later_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names were read before it; its place was nobody's, or had the name of what lay there or before it."""
    monkeypatch.setattr(symbols, "_REREAD_SECONDS", 0.0)
    symbolizer, before = symbols.Symbolizer(), symbols.kallsyms()
    with syscall.prog_load(features.RETURN_ZERO, ProgramType.RAW_TRACEPOINT, name="pf_later"):
        listed = re.search(r"^(\w+) t (bpf_prog_\w+_pf_later)", Path("/proc/kallsyms").read_text(), re.MULTILINE)
        assert listed
        place = np.array([int(listed[1], 16) + 1], np.uint64)
        assert symbolizer.kernel(place) == [listed[2]] != before.resolve(place)
        read = symbols.kallsyms()
        assert read is not before
        assert symbolizer.kernel(place) == [listed[2]] and symbols.kallsyms() is read, "it was asked for before"


def test_a_function_that_was_inlined_says_so() -> None:
    from probefleet_agent.errors import NoSuchTarget
    from probefleet_agent.kernel import btf_kernel, targets

    names = symbols.kallsyms().functions()
    clone = next(name for name in sorted(names) if ".isra." in name and name.split(".")[0] not in names)
    with pytest.raises(NoSuchTarget, match="inlined") as caught:
        targets.check_function(clone.split(".")[0])
    assert clone in caught.value.near_matches
    if features.btf():
        gone = next((name for name in sorted(btf_kernel.functions()) if name not in names), None)
        if gone:
            with pytest.raises(NoSuchTarget, match="inlined"):
                targets.check_function(gone)
    with pytest.raises(NoSuchTarget, match=r"near: .*tcp_sendmsg"):
        targets.check_function("tcp_sendmsgs")


def build(path: Path, name: str, *flags: str) -> None:
    """A program that does nothing for ever, with a function of this name."""
    # A build id is of the code, and not of its names.
    code = f"volatile int id = {len(name)}; __attribute__((noinline)) void {name}(void) {{ pause(); }}"
    source = f"#include <unistd.h>\n{code}\nint main(void) {{ for (;;) {name}(); }}\n"
    command = ["clang", "-O1", "-fno-inline", "-Wl,--build-id=sha1", *flags, "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)


def place(path: Path, name: str) -> int:
    """Where in the file the function lies."""
    with elf_file.open_file(path) as elf:
        found = elf.file_offset(name)
    assert found is not None
    return found


@contextlib.contextmanager
def running(*command: str, executable: str) -> Iterator[int]:
    """The process that has the executable mapped, as it calls it itself."""
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            maps_of = Path(f"/proc/{process.pid}/maps")
            # execve closes Popen's pipe before it maps the file; a shell comes before it.
            wait_until(lambda: f" {executable}\n" in maps_of.read_text())
            yield process.pid
        finally:
            process.kill()


def name_at(pid: int, executable: str, offset: int, symbolizer: symbols.Symbolizer) -> str:
    text = Path(f"/proc/{pid}/maps").read_text()
    mapping = next(each for each in symbols.executable_mappings(text) if each.path == executable)
    (found,) = symbolizer.user(pid, np.array([mapping.start + offset - mapping.offset], np.uint64))
    return found


def hidden_by(folder: Path, at: Path, executable: str) -> list[str]:
    """A command that runs the executable in a mount namespace of its own, where ``folder`` lies over ``at``."""
    return ["unshare", "--mount", "sh", "-c", f'mount --bind "{folder}" "{at}" && exec "{executable}"']


@pytest.mark.parametrize("map_files", [True, False], ids=["by-map-files", "by-its-root"])
def test_a_process_has_the_files_of_its_own_mount_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, map_files: bool
) -> None:
    """Two programs lie at one path: here one, in the container another."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, name in ((here, "probefleet_of_the_node"), (there, "probefleet_of_the_container")):
        folder.mkdir()
        build(folder / "app", name)
    if not map_files:  # as without CAP_CHECKPOINT_RESTORE
        monkeypatch.setattr(symbols._Wanted, "path", lambda self: Path(f"{self.root()}{self.mapping.path}"))
    app, symbolizer = str(here / "app"), symbols.Symbolizer()
    offsets = place(here / "app", "probefleet_of_the_node"), place(there / "app", "probefleet_of_the_container")
    with running(app, executable=app) as node, running(*hidden_by(there, here, app), executable=app) as container:
        names = [name_at(pid, app, at, symbolizer) for pid, at in zip((node, container), offsets, strict=True)]
    assert names == ["probefleet_of_the_node", "probefleet_of_the_container"]
    assert (symbolizer.resolved, symbolizer.unknown) == (2, 0)


def test_a_stripped_program_is_named_by_its_build_id_in_its_own_mount_namespace(tmp_path: Path) -> None:
    """Its full table lies in the container, and not on the node: there it is only the file that is known."""
    app, debug = tmp_path / "app", tmp_path / "debug"
    build(app, "probefleet_of_the_debug_file")
    offset, build_id = place(app, "probefleet_of_the_debug_file"), symbols.build_id(app)
    kept = debug / ".build-id" / build_id[:2]
    kept.mkdir(parents=True)
    # By a link, as distributions have it; an absolute one is the container's own.
    (debug / "app.debug").write_bytes(app.read_bytes())
    (kept / f"{build_id[2:]}.debug").symlink_to("/usr/lib/debug/app.debug")
    subprocess.run(["strip", "--strip-all", str(app)], check=True)
    at, symbolizer = Path("/usr/lib/debug"), symbols.Symbolizer()
    at.mkdir(exist_ok=True)
    with running(str(app), executable=str(app)) as node:
        assert name_at(node, str(app), offset, symbolizer) == "[app]"
    with running(*hidden_by(debug, at, str(app)), executable=str(app)) as container:
        assert name_at(container, str(app), offset, symbolizer) == "probefleet_of_the_debug_file"
    assert (symbolizer.resolved, symbolizer.unknown) == (1, 1)


def test_a_debug_file_of_another_program_names_nothing(tmp_path: Path) -> None:
    app, debug, other = tmp_path / "app", tmp_path / "debug", tmp_path / "other"
    build(app, "probefleet_right")
    build(other, "probefleet_wrong_one")
    offset, build_id = place(app, "probefleet_right"), symbols.build_id(app)
    kept = debug / ".build-id" / build_id[:2]
    kept.mkdir(parents=True)
    (kept / f"{build_id[2:]}.debug").write_bytes(other.read_bytes())
    subprocess.run(["strip", "--strip-all", str(app)], check=True)
    at = Path("/usr/lib/debug")
    at.mkdir(exist_ok=True)
    with running(*hidden_by(debug, at, str(app)), executable=str(app)) as container:
        assert name_at(container, str(app), offset, symbols.Symbolizer()) == "[app]"
