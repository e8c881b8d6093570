"""What runs once an interval: iterators, by a link that is read, and syscall programs, which need none."""

from __future__ import annotations

import errno
from typing import SupportsIndex

from probefleet_wire.btf_types import Kind as BtfKind

from probefleet_agent.errors import KernelError, NoSuchTarget, UnsupportedFeature
from probefleet_agent.kernel import btf_kernel, features, syscall, targets
from probefleet_agent.kernel.link import Attachment, Kind, Link, always
from probefleet_agent.kernel.uapi import AttachType, ProgramType

_PREFIX = "bpf_iter_"
#: Walk over one map's entries: outputs read maps themselves.
_OF_ONE_MAP = frozenset({"bpf_map_elem", "bpf_sk_storage_map", "sockmap"})


def _check_iterator(attachment: Attachment, _section: str) -> None:
    wanted = attachment.iterator.type
    if not features.btf():
        raise UnsupportedFeature("iterators", "5.8", "it carries no BTF (CONFIG_DEBUG_INFO_BTF)")
    if wanted in _OF_ONE_MAP:
        raise UnsupportedFeature(f"iterator {wanted} without a map to walk over", why="read the map by an output")
    kernel = btf_kernel.vmlinux()
    if kernel.find(_PREFIX + wanted, BtfKind.FUNC) is None:
        usual = ("task", "task_file", "task_vma", "tcp", "udp", "unix", "bpf_map", "bpf_prog", "bpf_link", "cgroup",
                 "netlink", "ipv6_route", "ksym")  # fmt: skip
        there = [name for name in usual if kernel.find(_PREFIX + name, BtfKind.FUNC) is not None]
        raise NoSuchTarget(f"iterator {wanted}", targets.near(wanted, there) or tuple(there))


def _iterator(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    way = f"iterator {attachment.iterator.type}"
    try:
        return Link((syscall.link_create(prog_fd, 0, AttachType.TRACE_ITER),), True, way)
    except KernelError as error:
        if error.errno == errno.EINVAL:
            raise KernelError(error.errno, f"attach to {way}", "Does it walk over one map, or one cgroup?") from error
        raise


def _check_interval(attachment: Attachment, section: str) -> None:
    if section.removeprefix("?") != "syscall":
        raise NoSuchTarget(
            f'interval for {attachment.program} of SEC("{section}"): that is for SEC("syscall")', where=""
        )
    if not features.syscall_programs():
        raise UnsupportedFeature("syscall programs", "5.14")


def _interval(_prog_fd: SupportsIndex, _attachment: Attachment) -> Link:
    return Link((), True, "run once an interval")


KINDS = {
    "iterator": Kind(
        always(ProgramType.TRACING, AttachType.TRACE_ITER),
        _check_iterator,
        _iterator,
        bound_to=lambda attachment: attachment.iterator.type,
        btf_name=lambda attachment: _PREFIX + attachment.iterator.type,
    ),
    "interval": Kind(always(ProgramType.SYSCALL), _check_interval, _interval),
}
