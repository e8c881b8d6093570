#!/usr/bin/python3
"""Runs a command under another Linux kernel: this machine's files, that kernel, as root.

Why: kprobes, fentry and LSM need what the kernel of a test machine may lack, and a probe that loads on one
kernel may be refused by another. In: a kernel (`vm_kernels`) and a command. Out: its output as it comes, its
exit status, and whatever it wrote to $VM_OUT. Called by hand, by make, and by pytest through `run()`.

qemu emulates two CPUs; the host's whole file system is the guest's, read only, under a layer of memory, so
the command sees the same project, interpreter and libraries, and its changes end with the guest. /tmp and
/run are empty there. stdout and stderr travel over virtio ports, byte by byte as they were written; the
kernel's console is kept aside and shown only when the guest fails. Over a third port the command may ask the
host (`vm_questions`), where the caller has somebody to answer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

if not __package__:  # started as a program, by a python3 that does not know where the project lies
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.kernel import vm_kernels, vm_questions

VmError = vm_kernels.VmError

CPU_COUNT = 2
# What an emulator does slowly, and no test asks for. With `erms` Linux and glibc copy and clear by `rep movsb`, which
# is emulated byte by byte: imports of Python took twice the time. `smap` changes the CPU's mode at each access to a
# user's memory. Without `tsc=reliable` Linux takes the HPET for its clock, and each look at it leaves the emulated CPU.
CPU = "max,-erms,-smap,-smep,-umip,-pku"
KERNEL_PARAMETERS = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off lsm=bpf random.trust_cpu=on tsc=reliable"
# The emulated kernel itself takes 4 s to boot; the rest is for a machine that is busy with other things.
BOOT_SECONDS = 180.0
RUN_SECONDS = 1800.0
FAILED_STATUS, TIMEOUT_STATUS = 125, 124  # as timeout(1) and env(1) say them
HOST_ADDRESS = "10.0.2.2"  # the host's loopback, as a guest with a network reaches it
CONSOLE_TAIL_LINES = 30


class VmTimeoutError(VmError):
    """The guest was stopped because its time was over."""


@dataclass(frozen=True, slots=True)
class Completed:
    """What a command in a guest left: like subprocess.CompletedProcess, and the kernel's console."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    console: str

    def check(self) -> Completed:
        """This result, or a VmError with what the command printed if its status is not 0."""
        if self.returncode:
            raise VmError(
                f"`{shlex.join(self.argv)}` failed with status {self.returncode} in the guest\n"
                f"{self.stdout}{self.stderr}{self.console}"
            )
        return self


def run(
    kernel: str,
    argv: Sequence[str],
    *,
    seconds: float = RUN_SECONDS,
    memory: str = "4G",
    out: Path | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdout: BinaryIO | None = None,
    stderr: BinaryIO | None = None,
    answer: Callable[[bytes], bytes] | None = None,
) -> Completed:
    """Boot `kernel` (a suite, or the start of a release), run `argv` in `cwd` as root, and power off.

    Files that the command writes to $VM_OUT appear in `out` at once. `environment` is added to PATH, HOME and
    VM (the guest's release, so that a program knows where it is). `stdout` and `stderr` receive the output as
    it comes; it is returned whole in any case. `answer` is called, in a thread, with what programs in the guest
    ask by `vm_questions.ask`. Raises VmTimeoutError after `seconds`, VmError when the guest ends without a status.
    """
    chosen = vm_kernels.find(kernel)
    vm_kernels.require("qemu-system-x86_64", "cpio", "busybox", "modprobe")
    vm_kernels.refresh_initramfs(chosen)
    with ExitStack() as stack:
        job = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="probefleet-vm-")))
        if out is None:
            out = job / "out"
        out.mkdir(parents=True, exist_ok=True)
        _write_job(job, chosen, argv, cwd=cwd or Path.cwd(), environment=environment or {})
        streams = {
            name: stack.enter_context(_Stream(sink))
            for name, sink in (("out", stdout), ("err", stderr), ("console", None))
        }
        if answer is not None:
            stack.enter_context(vm_questions.answered(job / "questions", answer))
        command = _command(chosen, memory, job=job, out=out, streams=streams, questions=answer is not None)
        guest = stack.enter_context(_Guest(command, streams))
        late = guest.wait(seconds, started=job / "started")
        text = {name: stream.text() for name, stream in streams.items()}
        status = job / "status"
        if not late and status.exists():
            return Completed(tuple(argv), int(status.read_text()), text["out"], text["err"], text["console"])
        reason = late or "the guest ended without a status: its kernel panicked or qemu failed"
        tail = "\n".join(text["console"].splitlines()[-CONSOLE_TAIL_LINES:])
        error = VmTimeoutError if late else VmError
        raise error(f"Linux {chosen.release}: {reason}\n--- the end of its console\n{tail}")


class _Stream:
    """One pipe that qemu writes to: collected, and passed on as it comes."""

    def __init__(self, sink: BinaryIO | None) -> None:
        self.sink = sink
        self.read_fd, self.write_fd = os.pipe()
        self._parts: list[bytes] = []

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.read_fd)
        self.close_writer()

    def close_writer(self) -> None:
        """Leave the writing end to qemu alone, so that its exit ends the stream."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def take(self) -> bool:
        """Take what is there; False when it was the end."""
        part = os.read(self.read_fd, 65536)
        if part:
            self._parts.append(part)
            if self.sink:
                self.sink.write(part)
                self.sink.flush()
        return bool(part)

    def text(self) -> str:
        return b"".join(self._parts).decode(errors="replace")


class _Guest:
    """A running qemu; leaving its context ends it."""

    def __init__(self, command: Sequence[str], streams: Mapping[str, _Stream]) -> None:
        self._streams = streams
        # A session of its own: Ctrl-C reaches us alone, and we end the guest; where we are killed, the kernel does.
        self._process = subprocess.Popen(
            ("setpriv", "--pdeathsig", "KILL", *command),
            stdin=subprocess.DEVNULL,
            stdout=streams["console"].write_fd,
            stderr=streams["console"].write_fd,
            pass_fds=[streams["out"].write_fd, streams["err"].write_fd],
            start_new_session=True,
        )
        for stream in streams.values():
            stream.close_writer()
        # A session is a scheduler's group of its own, and a nice value counts within it alone: give it to the group.
        with contextlib.suppress(OSError):  # ended already, or a kernel without such groups
            Path(f"/proc/{self._process.pid}/autogroup").write_text(str(os.nice(0)))

    def __enter__(self) -> _Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self, seconds: float, *, started: Path) -> str:
        """Pass the output on until the guest is off; the reason why if that took too long, else ""."""
        began = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for stream in self._streams.values():
                selector.register(stream.read_fd, selectors.EVENT_READ, stream)
            while selector.get_map():
                for key, _ in selector.select(timeout=1.0):
                    if not key.data.take():
                        selector.unregister(key.fd)
                elapsed = time.monotonic() - began
                if elapsed > seconds:
                    return f"still running after {seconds:.0f} s, stopped; give it more with --seconds"
                if elapsed > BOOT_SECONDS and not started.exists():
                    return f"did not boot within {BOOT_SECONDS:.0f} s, stopped"
        self._process.wait()
        return ""


def _write_job(
    job: Path, kernel: vm_kernels.Kernel, argv: Sequence[str], *, cwd: Path, environment: Mapping[str, str]
) -> None:
    """What vm_init reads in the guest: where the modules lie, and the command as a script."""
    variables = {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "HOME": os.environ.get("HOME", "/root"),
        "LANG": "C.UTF-8",
        "VM": kernel.release,
        "VM_OUT": "/run/vm/out",
        "VM_HOST": HOST_ADDRESS,
        **environment,
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    (job / "settings").write_text(
        f"MODULES={shlex.quote(str(kernel.modules.resolve()))}\nFOLDER={shlex.quote(str(cwd.resolve()))}\n"
    )
    (job / "run").write_text(f"{exports}cd {shlex.quote(str(cwd.resolve()))} || exit 125\nexec {shlex.join(argv)}\n")


def _command(
    kernel: vm_kernels.Kernel,
    memory: str,
    *,
    job: Path,
    out: Path,
    streams: Mapping[str, _Stream],
    questions: bool = False,
) -> list[str]:
    """The qemu command line."""
    shares = {
        "host": (Path("/"), ",readonly=on,multidevs=remap"),
        "job": (job, ""),
        "out": (out.resolve(), ""),
    }
    command = [
        "qemu-system-x86_64",
        *("-M", "q35", "-cpu", os.environ.get("VM_CPU", CPU), "-smp", str(CPU_COUNT), "-m", memory),
        # Emulated even where /dev/kvm opens: in a rented machine it may open and then never run the guest.
        # Both CPUs in one thread: with a thread each, Linux 6.12 was seen to run into the code that it was patching,
        # where tracepoints are switched, and the other core of a small machine is wanted by who waits for the guest.
        *("-accel", os.environ.get("VM_ACCEL", "tcg,thread=single")),
        *("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(kernel.vmlinuz), "-initrd", str(kernel.initramfs)),
        *("-append", KERNEL_PARAMETERS),
        *("-device", "virtio-serial-pci,max_ports=4"),
        *("-netdev", "user,id=net,net=10.0.2.0/24", "-device", "virtio-net-pci,netdev=net,romfile="),
    ]
    for port, name in enumerate(("out", "err"), start=1):
        fd = streams[name].write_fd
        command += [
            "-add-fd",
            f"fd={fd},set={port}",
            "-chardev",
            f"file,id={name},path=/dev/fdset/{port},append=on",
        ]
        command += ["-device", f"virtserialport,nr={port},chardev={name},name={name}"]
    if questions:
        command += ["-chardev", f"socket,id=questions,path={job / 'questions'}"]
        command += ["-device", "virtserialport,nr=3,chardev=questions,name=questions"]
    for tag, (path, options) in shares.items():
        command += ["-fsdev", f"local,id={tag},path={path},security_model=none{options}"]
        command += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return command


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    suites = ", ".join(f"{suite} ({kernel})" for suite, kernel in vm_kernels.SUITES.items())
    parser = argparse.ArgumentParser(
        prog="vm",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"Suites: {suites}. Debian packages needed: {' '.join(vm_kernels.required_packages())}.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="fetch | list | run")
    fetch = commands.add_parser("fetch", help="download and unpack the kernel of each suite")
    fetch.add_argument("suites", nargs="+", metavar="SUITE", choices=tuple(vm_kernels.SUITES), help=suites)
    fetch.add_argument("--refresh", action="store_true", help="look for a newer kernel than the one that is there")
    commands.add_parser("list", help="the kernels that are unpacked, with their exact versions")
    start = commands.add_parser("run", help="boot a kernel and run a command; its exit status is ours")
    start.add_argument("kernel", help="a suite, or the start of a release: bookworm, 6.1")
    start.add_argument("--out", type=Path, help="the folder that the command sees as $VM_OUT")
    start.add_argument("--seconds", type=float, default=RUN_SECONDS, help="time limit, boot included (%(default)s)")
    start.add_argument("--memory", default="4G", help="the guest's memory (%(default)s)")
    start.add_argument("argv", nargs="*", metavar="-- CMD", help="the command, run in the current folder")
    # Split by hand: what follows the first "--" is the guest's, whatever it looks like.
    end = list(argv).index("--") if "--" in argv else len(argv)
    command = argv[end + 1 :]
    arguments = parser.parse_args(argv[:end])
    if arguments.command == "run":
        arguments.argv = [*arguments.argv, *command]
        if not arguments.argv:
            parser.error("run: no command; write it after --")
    return arguments


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    arguments = _arguments(argv)

    def say(line: str) -> None:
        print(f"vm: {line}", file=sys.stderr, flush=True)

    try:
        if arguments.command == "fetch":
            for suite in arguments.suites:
                vm_kernels.fetch(suite, refresh=arguments.refresh, say=say)
        elif arguments.command == "list":
            for kernel in vm_kernels.unpacked():
                print(f"{kernel.suite:20} {kernel.release:28} {kernel.version:24} fetched {kernel.fetched_at}")
        else:
            return run(
                arguments.kernel,
                arguments.argv,
                seconds=arguments.seconds,
                memory=arguments.memory,
                out=arguments.out,
                stdout=sys.stdout.buffer,
                stderr=sys.stderr.buffer,
            ).returncode
    except VmTimeoutError as error:
        say(str(error))
        return TIMEOUT_STATUS
    except VmError as error:
        say(str(error))
        return FAILED_STATUS
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
