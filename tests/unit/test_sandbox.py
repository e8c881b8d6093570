"""What a locked child can do, and what happens to one that wants more."""

from __future__ import annotations

import os
import resource
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from probefleet_wire import sandbox

CAT, PYTHON = Path("/usr/bin/cat"), Path(sys.executable).resolve()
STANDARD_LIBRARY = Path(os.__file__).parent


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def python(scratch: Path, code: str, **limits: float) -> sandbox.Finished:
    """Run Python code locked in: it has system calls at hand, as a compiler that was taken over would."""
    return sandbox.run(
        [PYTHON, "-I", "-S", "-c", textwrap.dedent(code)],
        grants=sandbox.Grants(scratch, (PYTHON, STANDARD_LIBRARY)),
        limits=sandbox.Limits(**limits),  # type: ignore[arg-type]
    )


def test_the_tool_runs_and_writes_in_its_scratch(scratch: Path) -> None:
    finished = python(scratch, "open('out', 'w').write('done'); print('said')")
    assert (finished.status, finished.stdout, finished.stderr, finished.limit) == (0, b"said\n", b"", "")
    assert (scratch / "out").read_text() == "done"


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/1/environ", "/root"])
def test_files_outside_the_grants_cannot_be_opened(scratch: Path, path: str) -> None:
    finished = sandbox.run([CAT, path], grants=sandbox.Grants(scratch, (CAT,)))
    assert finished.status == 1
    assert finished.stdout == b""


def test_a_granted_tree_is_read_only(scratch: Path, tmp_path: Path) -> None:
    tree = tmp_path / "headers"
    tree.mkdir()
    (tree / "a.h").write_text("int a;")
    if os.geteuid() == 0:
        tree.chmod(0o777)
    code = f"""
        print(open({str(tree / "a.h")!r}).read())
        try: open({str(tree / "b.h")!r}, "w")
        except OSError as error: print(type(error).__name__)
    """
    grants = sandbox.Grants(scratch, (PYTHON, STANDARD_LIBRARY, tree))
    finished = sandbox.run([PYTHON, "-I", "-S", "-c", textwrap.dedent(code)], grants=grants)
    assert finished.stdout.decode().split()[:2] == ["int", "a;"]
    assert finished.stdout.decode().split()[2] in ("OSError", "PermissionError")
    assert [each.name for each in tree.iterdir()] == ["a.h"]


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.socket()",
        "import socket; socket.socketpair()",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.memfd_create('x')",
        "import os; os.chmod('.', 0o777)",
        "import os; os.link('/etc/passwd', 'x')",
        "import os; os.symlink('/etc/passwd', 'x')",
        "import resource; resource.prlimit(1, resource.RLIMIT_CPU)",
        "import ctypes, errno; c = ctypes.CDLL(None, use_errno=True)\n"
        "if c.ptrace(16, 1, 0, 0) < 0: raise OSError(ctypes.get_errno(), 'ptrace')",
        "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
        "if c.unshare(0x10000000) < 0: raise OSError(ctypes.get_errno(), 'unshare')",
        "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
        "if c.syscall(425, 1, 0) < 0: raise OSError(ctypes.get_errno(), 'io_uring')",
        "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
        "if c.syscall(321 if __import__('os').uname().machine == 'x86_64' else 280, 0, 0, 0) < 0:"
        " raise OSError(ctypes.get_errno(), 'bpf')",
    ],
)
def test_system_calls_that_no_compiler_needs_are_refused(scratch: Path, attempt: str) -> None:
    code = "try:\n" + textwrap.indent(attempt, "    ") + "\nexcept OSError as error:\n    print(error.errno)"
    assert python(scratch, code).stdout == b"1\n"  # EPERM


def test_nothing_of_the_parent_is_handed_down(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with open("/etc/passwd") as file:
        os.set_inheritable(file.fileno(), True)
        finished = python(
            scratch,
            """
            import os
            print(sorted(os.environ), os.getuid() != 0)
            for number in range(3, 64):
                try: os.fstat(number); print("open", number)
                except OSError: pass
            """,
        )
    names = ["HOME", "LC_ALL", "TMPDIR"]
    assert finished.stdout.decode() == f"{names} True\n" if os.geteuid() == 0 else f"{names} {os.getuid() != 0}\n"


@pytest.mark.parametrize(
    ("code", "limits", "limit"),
    [
        ("while True: pass", {"cpu_seconds": 1}, "cpu"),
        ("import time; time.sleep(60)", {"wall_seconds": 0.5}, "wall"),
        ("print('x' * 3_000_000)", {}, "output"),
        ("import sys; sys.stderr.write('x' * 3_000_000)", {}, "output"),
        ("import os; os.close(1); os.close(2); import time; time.sleep(60)", {"wall_seconds": 0.5}, "wall"),
        ("open('big', 'wb').write(b'x' * 2_000_000)", {"file_bytes": 1 << 20}, ""),
    ],
)
def test_a_child_that_takes_too_much_is_ended_and_the_limit_named(
    scratch: Path, code: str, limits: dict[str, float], limit: str
) -> None:
    finished = python(scratch, code, **limits)
    assert finished.status != 0
    assert finished.limit == limit  # CPython ignores SIGXFSZ: it sees EFBIG
    assert finished.seconds < 10


def test_memory_is_bounded(scratch: Path) -> None:
    finished = python(scratch, "x = bytearray(400 << 20)", memory_bytes=300 << 20)
    assert b"MemoryError" in finished.stderr
    # Between fork and exec the child has our memory; the kernel counts that, too.
    ours_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 1 << 20 < finished.peak_bytes < max(300 << 20, ours_bytes + (1 << 20))


def test_a_tool_that_does_not_exist_is_an_error_with_its_name(scratch: Path) -> None:
    with pytest.raises(sandbox.SandboxError, match="No such file"):
        sandbox.run(["/usr/bin/no-such-tool"], grants=sandbox.Grants(scratch))


def test_unknown_machines_are_refused() -> None:
    with pytest.raises(sandbox.SandboxUnavailable, match="riscv64"):
        sandbox.seccomp_filter("riscv64")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_lets_only_listed_calls_through(machine: str) -> None:
    """Runs the classic BPF program in Python, for machines that this one is not."""
    from probefleet_wire import syscalls

    words = list(struct.iter_unpack("<HBBI", sandbox.seccomp_filter(machine)))
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def decide(number: int, argument: int = 0, arch: int = architecture) -> int:
        at, accumulator = 0, 0
        while True:
            code, yes, no, value = words[at]
            if code == 0x20:
                accumulator = {0: number, 4: arch, 16: argument}[value]
            elif code == 0x06:
                return int(value)
            else:
                taken = accumulator == value if code == 0x15 else accumulator & value
                at += yes if taken else no
            at += 1

    allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

    def number(name: str) -> int:
        found = syscalls.number(name, machine)
        assert found is not None
        return found

    assert {decide(number(name)) for name in ("read", "openat", "unlinkat", "accept")} == {allow, refuse}
    assert decide(number("clone"), 0x00010000) == allow
    assert decide(number("clone"), 17) == refuse
    assert decide(number("clone3")) == absent
    assert (decide(number("prlimit64"), 0), decide(number("prlimit64"), 1)) == (allow, refuse)
    assert decide(0, arch=0x40000003) == kill
    listed = {name for name in syscalls.names(machine).values() if decide(number(name)) == allow}
    assert not listed & {"socket", "connect", "ptrace", "bpf", "mount", "keyctl", "io_uring_setup", "kill", "execveat"}
    assert decide(5000) == refuse


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give most of it up; run as root")
def test_root_that_may_not_become_another_user_gives_up_its_capabilities(tmp_path: Path) -> None:
    """As the agent in its capabilities mode: uid 0 with some powers, and none to change files' owners or its own."""
    code = """
import sys
from pathlib import Path
from probefleet_wire import sandbox
python, library, folder = map(Path, sys.argv[1:])
look = "import os; print(os.getuid(), *[l.split()[1] for l in open('/proc/self/status') if l.startswith('CapEff')])"
grants = sandbox.Grants(folder, (python, library, Path("/proc")))
finished = sandbox.run([python, "-I", "-S", "-c", look + "; open('out', 'w')"], grants=grants)
print(finished.status, finished.stdout.decode().strip(), finished.stderr.decode())
"""
    some = "+sys_ptrace,+dac_read_search"
    command = ["setpriv", f"--bounding-set=-all,{some}", f"--inh-caps=-all,{some}", sys.executable, "-c", code]
    words = [*command, str(PYTHON), str(STANDARD_LIBRARY), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["0", "0", "0000000000000000"], "")
    assert (tmp_path / "out").stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it up; run as root")
def test_it_works_without_any_privilege(tmp_path: Path) -> None:
    """As under Kubernetes' restricted profile: an ordinary uid, no capabilities, no_new_privs.

    A kernel without Landlock may still let anybody have a user namespace; one with neither is refused, in words.
    """
    folder = Path("/tmp") / f"probefleet-unprivileged-{os.getpid()}"
    folder.mkdir(mode=0o777)
    os.chown(folder, 65533, 65533)
    code = """
import sys
from pathlib import Path
from probefleet_wire import sandbox
for path in ("/etc/passwd", "/proc/self/environ"):
    finished = sandbox.run(["/usr/bin/cat", path], grants=sandbox.Grants(Path(sys.argv[1]), (Path("/usr/bin/cat"),)))
    print(finished.status, len(finished.stdout))
"""
    command = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups", "--no-new-privs"]
    command += ["--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    finally:
        shutil.rmtree(folder)
    if "landlock" not in sandbox.describe() and done.returncode:
        assert "SandboxUnavailable: neither Landlock (Linux 5.13" in done.stderr
    else:
        assert done.stdout == "1 0\n1 0\n", done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(("mode", "stays"), [(0o755, False), (0o700, True)])
def test_without_a_namespace_it_stays_who_it_is_where_another_user_may_not_go(mode: int, stays: bool) -> None:
    child = runpy.run_path(str(sandbox.CHILD))
    home, scratch = Path(tempfile.mkdtemp(dir="/tmp")), Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        tree = home / "include"
        tree.mkdir()
        home.chmod(mode)
        os.chown(scratch, 65534, 65534)
        config = {"uid": 65534, "read": [str(tree), "/nowhere/at/all"], "scratch": str(scratch)}
        child["stay_where_nobody_may_not_go"](config)
        assert (config["uid"] is None) == stays
        assert scratch.stat().st_uid == (0 if stays else 65534)
    finally:
        shutil.rmtree(home)
        shutil.rmtree(scratch)
