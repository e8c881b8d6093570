"""Attach by trampolines: to a kernel function's entry or return with typed arguments (fentry, fexit), and to LSM hooks.

The kernel binds such a program to its function when it loads it, and makes no use of what it answers (since Linux 6.8
it refuses any answer but 0). That is how LSM hooks are watched: a program for ``lsm/file_open`` runs as fexit of
``bpf_lsm_file_open``, the function that the kernel asks for BPF's verdict. It sees the hook's arguments and, behind
them, the verdict, as an LSM program does, and it cannot change it.
"""

from __future__ import annotations

import errno
from typing import SupportsIndex

from probefleet_agent.errors import KernelError, NoSuchTarget, UnsupportedFeature
from probefleet_agent.kernel import btf_kernel, features, kernel_functions, mounts, syscall, targets
from probefleet_agent.kernel.link import Attachment, Kind, Link
from probefleet_agent.kernel.uapi import AttachType, ProgramType

_LSM = "bpf_lsm_"


def _need_trampolines() -> None:
    if not features.btf():
        raise UnsupportedFeature("fentry and fexit", "5.5", "it carries no BTF (CONFIG_DEBUG_INFO_BTF)")
    if not features.fentry():
        why = "it has no ftrace trampolines (CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS); take a kprobe or tp_btf"
        raise UnsupportedFeature("fentry and fexit", why=why)


def _check_fentry(attachment: Attachment, _section: str) -> None:
    _need_trampolines()
    kernel_functions.check_typed(attachment.fentry.function)


def _type(attachment: Attachment, _section: str) -> tuple[int, int]:
    return ProgramType.TRACING, AttachType.TRACE_FEXIT if attachment.fentry.on_return else AttachType.TRACE_FENTRY


def _fentry(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    wanted = attachment.fentry
    return _open(prog_fd, wanted.function, f"{'fexit' if wanted.on_return else 'fentry'} {wanted.function}")


def _open(prog_fd: SupportsIndex, function: str, way: str) -> Link:
    """The program knows its function since it was loaded."""
    try:
        return Link((syscall.raw_tracepoint_open(None, prog_fd),), True, way)
    except KernelError as error:
        what = f"function {function} to trace with typed arguments"
        if error.errno == errno.EBUSY:
            why = "it is taken: a live patch, or another tracer that allows no second one, holds it"
            raise NoSuchTarget(what, why=why) from error
        if error.errno == errno.E2BIG:
            raise NoSuchTarget(what, why="as many programs as the kernel allows are attached to it already") from error
        if error.errno in (errno.EINVAL, errno.ENOENT, 524):
            raise NoSuchTarget(what, why="the kernel cannot patch it (notrace, or not prepared for it)") from error
        raise


def _check_lsm(attachment: Attachment, _section: str) -> None:
    hook = attachment.lsm.hook
    _need_trampolines()
    hooks = [name.removeprefix(_LSM) for name in btf_kernel.functions() if name.startswith(_LSM)]
    if not hooks:
        raise UnsupportedFeature("LSM hooks for BPF", "5.7", "it was built without CONFIG_BPF_LSM")
    if hook not in hooks:
        raise NoSuchTarget(f"LSM hook {hook}", targets.near(hook, hooks))
    active = _active_modules()
    if active and "bpf" not in active:
        why = f"its boot parameter lsm= does not name bpf (it says {','.join(active)}), so the hooks are never called"
        raise UnsupportedFeature("LSM hooks for BPF", why=why)
    kernel_functions.check_typed(f"{_LSM}{hook}")


def _active_modules() -> list[str]:
    """Security modules in the order in which the kernel asks them; empty where it does not say."""
    root = mounts.securityfs()
    try:
        return (root / "lsm").read_text().strip().split(",") if root else []
    except OSError:
        return []


def _lsm(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    hook = attachment.lsm.hook
    return _open(prog_fd, f"{_LSM}{hook}", f"lsm {hook} (fexit of {_LSM}{hook})")


KINDS = {
    "fentry": Kind(
        _type,
        _check_fentry,
        _fentry,
        bound_to=lambda attachment: attachment.fentry.function,
        btf_name=lambda attachment: attachment.fentry.function,
    ),
    "lsm": Kind(
        lambda _attachment, _section: (ProgramType.TRACING, AttachType.TRACE_FEXIT),
        _check_lsm,
        _lsm,
        bound_to=lambda attachment: f"{_LSM}{attachment.lsm.hook}",
        btf_name=lambda attachment: f"{_LSM}{attachment.lsm.hook}",
    ),
}
