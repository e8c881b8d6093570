"""BCC's trap: clang lays structs out for this machine, BPF's back end for BPF. They have to agree, member by member.

For every struct that programs commonly read, BCC compiles the address of every member (bit-fields have none), and the
offset in the instructions is compared with this kernel's BTF; or with another's: a compiler sees nothing of a kernel
but its types, so PROBEFLEET_TEST_BTF=FILE asks the same of a kernel that is not running.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from probefleet_agent.kernel import bcc, btf_kernel
from probefleet_wire import btf_c
from probefleet_wire.btf import Btf
from probefleet_wire.btf_types import Kind, Struct, Union

HEADERS = Path(f"/tmp/probefleet-test-headers-{os.getuid()}")
VMLINUX = Path(os.environ.get("PROBEFLEET_TEST_BTF") or btf_kernel.file())
STRUCTS = """
task_struct sock sock_common inet_sock inet_connection_sock tcp_sock udp_sock unix_sock socket inode file dentry qstr
path vfsmount super_block address_space page folio sk_buff request bio gendisk block_device net_device net
request_queue mm_struct vm_area_struct cgroup css_set cgroup_subsys_state kernfs_node signal_struct sighand_struct
files_struct fdtable fs_struct cred user_namespace pid pid_namespace upid nsproxy uts_namespace mnt_namespace mount rq
cfs_rq sched_entity task_group thread_struct iphdr ipv6hdr tcphdr udphdr ethhdr linux_binprm kiocb iov_iter msghdr
pt_regs perf_event hrtimer timer_list work_struct workqueue_struct module device driver_private bpf_prog bpf_map
irq_desc irqaction blk_mq_hw_ctx nvme_request scsi_cmnd scsi_device rtable fib_info neighbour napi_struct softnet_data
mem_cgroup
""".split()  # noqa: SIM905 (a list to add to)


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf.parse(VMLINUX.read_bytes())


def members(btf: Btf, record: Struct | Union, base: int = 0) -> Iterator[tuple[str, int]]:
    """(name, offset) of every member that has an address; those of anonymous parts count as the struct's own."""
    for member in record.members:
        inner = btf.type(btf.resolve(member.type))
        if member.bitfield_bits:
            continue
        if not member.name and isinstance(inner, Struct | Union):
            yield from members(btf, inner, base + member.offset_bytes)
        elif member.name:
            yield member.name, base + member.offset_bytes


def result_of(code: bytes) -> int:
    """What `return (u64)&p->member` adds to its argument: runs the few instructions that clang makes of it."""
    registers: dict[int, int] = {1: 0}
    for operation, places, _, immediate in struct.iter_unpack("<BBhi", code):
        to, source = places & 15, places >> 4
        if operation == 0xBF:  # to = source
            registers[to] = registers[source]
        elif operation == 0x07:  # to += immediate
            registers[to] += immediate
        elif operation == 0x95:
            return registers[0]
        else:
            raise AssertionError(f"an instruction of another kind: {operation:#x}")
    raise AssertionError("no exit")


@pytest.mark.of_types
@pytest.mark.shows("besides/bcc-offsets")
def test_every_member_lies_where_btf_says(btf: Btf) -> None:
    wanted: dict[str, int] = {}
    lines = []
    for name in STRUCTS:
        type_id = btf.find(name, Kind.STRUCT)
        if type_id is None:
            continue  # a driver's or a newer kernel's; the count below keeps this honest
        for member, offset in members(btf, btf.struct(type_id)):
            function = f"f{len(wanted)}"
            wanted[function] = offset
            lines.append(f"u64 {function}(struct {name} *p) {{ return (u64)&p->{member}; }} // {name}.{member}")
    assert len(wanted) > 2000
    names = {line.split()[1].partition("(")[0]: line.rpartition("// ")[2] for line in lines}
    wrong = []
    # BCC takes a limited source at a time.
    for start in range(0, len(lines), 700):
        source = "\n".join(line.partition(" //")[0] for line in lines[start : start + 700])
        program = bcc.compile(source, headers_root=HEADERS, vmlinux=VMLINUX, timeout_seconds=400)
        found = {function.name: result_of(function.instructions) for function in program.functions}
        assert len(found) == len(lines[start : start + 700])
        wrong += [
            f"{names[function]}: BPF reads at {offset}, the kernel has it at {wanted[function]}"
            for function, offset in found.items()
            if offset != wanted[function]
        ]
    assert wrong == []


@pytest.mark.of_types
@pytest.mark.shows("besides/bcc-offsets")
def test_sizes_agree_too(btf: Btf) -> None:
    """An array of structs steps by their size: also what BPF's back end computes."""
    sizes = {name: btf.size_of(type_id) for name in STRUCTS if (type_id := btf.find(name, Kind.STRUCT))}
    source = "\n".join(
        f"u64 s_{name}(struct {name} *p) {{ return (u64)(p + 1); }}" for name, size in sizes.items() if size
    )
    program = bcc.compile(source, headers_root=HEADERS, vmlinux=VMLINUX, timeout_seconds=400)
    found = {function.name.removeprefix("s_"): result_of(function.instructions) for function in program.functions}
    assert found == {name: size for name, size in sizes.items() if size}


def test_the_header_is_made_quickly(btf: Btf) -> None:
    def seconds() -> float:
        started = time.process_time()
        assert "struct task_struct {" in btf_c.emit(btf)
        return time.process_time() - started

    # The least of a few: a busy machine can only add to it.
    most = 1.5 if "VM" not in os.environ else 60
    assert any(seconds() < most for _ in range(3))
