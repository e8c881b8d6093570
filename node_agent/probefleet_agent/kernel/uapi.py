"""Numbers and layouts of ``include/uapi/linux/bpf.h`` and ``perf_event.h``, as ``syscall`` hands them to the kernel.

Only what the agent uses. The kernel takes a ``bpf_attr`` that is shorter than its own, and one that is longer as
long as the tail is zero; info structures are filled as far as both sides know them.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

from probefleet_wire import map_types
from probefleet_wire.map_types import MapType as MapType


class Command(IntEnum):
    """``enum bpf_cmd``."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    PROG_GET_NEXT_ID = 11
    MAP_GET_NEXT_ID = 12
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    RAW_TRACEPOINT_OPEN = 17
    BTF_LOAD = 18
    BTF_GET_FD_BY_ID = 19
    MAP_LOOKUP_AND_DELETE_ELEM = 21
    MAP_FREEZE = 22
    MAP_LOOKUP_BATCH = 24
    MAP_LOOKUP_AND_DELETE_BATCH = 25
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_GET_FD_BY_ID = 30
    LINK_GET_NEXT_ID = 31
    ENABLE_STATS = 32
    ITER_CREATE = 33


PER_CPU_TYPES, HASH_TYPES = map_types.PER_CPU, map_types.HASHES


class ProgramType(IntEnum):
    """``enum bpf_prog_type``: the kinds that only observe, or are made to (``network_programs``)."""

    SOCKET_FILTER = 1
    KPROBE = 2  # and uprobes
    SCHED_CLS = 3
    TRACEPOINT = 5
    XDP = 6
    PERF_EVENT = 7
    CGROUP_SKB = 8
    CGROUP_SOCK = 9
    RAW_TRACEPOINT = 17
    TRACING = 26  # tp_btf with AttachType.TRACE_RAW_TP
    SYSCALL = 31


class AttachType(IntEnum):
    """``enum bpf_attach_type``, where a program type needs one."""

    NONE = 0
    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_INET_SOCK_CREATE = 2
    CGROUP_INET4_POST_BIND = 12
    CGROUP_INET6_POST_BIND = 13
    TRACE_RAW_TP = 23
    TRACE_FENTRY = 24
    TRACE_FEXIT = 25
    TRACE_ITER = 28
    CGROUP_INET_SOCK_RELEASE = 34
    XDP = 37
    PERF_EVENT = 41
    TCX_INGRESS = 46
    TCX_EGRESS = 47
    TRACE_KPROBE_MULTI = 42
    TRACE_UPROBE_MULTI = 48


BPF_F_NO_PREALLOC = 1
BPF_F_SLEEPABLE = 1 << 4
ENOTSUPP = 524  # the kernel lets it out, though user space has no such errno
BPF_F_MMAPABLE = 1 << 10
BPF_ANY, BPF_NOEXIST, BPF_EXIST = 0, 1, 2


def _attr(
    *fields: tuple[str, type[ctypes._SimpleCData[int]] | type[ctypes.Array[ctypes.c_char]]],
) -> type[ctypes.Structure]:
    return type("bpf_attr", (ctypes.Structure,), {"_fields_": list(fields)})


_u32, _u64, _name = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char * 16
MapCreate = _attr(
    ("map_type", _u32), ("key_size", _u32), ("value_size", _u32), ("max_entries", _u32), ("map_flags", _u32),
    ("inner_map_fd", _u32), ("numa_node", _u32), ("map_name", _name), ("map_ifindex", _u32), ("btf_fd", _u32),
    ("btf_key_type_id", _u32), ("btf_value_type_id", _u32),
)  # fmt: skip
Element = _attr(("map_fd", _u32), ("pad", _u32), ("key", _u64), ("value", _u64), ("flags", _u64))
Batch = _attr(
    ("in_batch", _u64), ("out_batch", _u64), ("keys", _u64), ("values", _u64), ("count", _u32), ("map_fd", _u32),
    ("elem_flags", _u64), ("flags", _u64),
)  # fmt: skip
ProgLoad = _attr(
    ("prog_type", _u32), ("insn_cnt", _u32), ("insns", _u64), ("license", _u64), ("log_level", _u32),
    ("log_size", _u32), ("log_buf", _u64), ("kern_version", _u32), ("prog_flags", _u32), ("prog_name", _name),
    ("prog_ifindex", _u32), ("expected_attach_type", _u32), ("prog_btf_fd", _u32), ("func_info_rec_size", _u32),
    ("func_info", _u64), ("func_info_cnt", _u32), ("line_info_rec_size", _u32), ("line_info", _u64),
    ("line_info_cnt", _u32), ("attach_btf_id", _u32), ("attach_prog_fd", _u32), ("pad", _u32), ("fd_array", _u64),
)  # fmt: skip
Object = _attr(("pathname", _u64), ("bpf_fd", _u32), ("file_flags", _u32))
Info = _attr(("bpf_fd", _u32), ("info_len", _u32), ("info", _u64))
ById = _attr(("id", _u32), ("next_id", _u32), ("open_flags", _u32))
RawTracepoint = _attr(("name", _u64), ("prog_fd", _u32), ("pad", _u32), ("cookie", _u64))
LinkCreate = _attr(("prog_fd", _u32), ("target_fd", _u32), ("attach_type", _u32), ("flags", _u32), ("cookie", _u64))
KprobeMulti = _attr(
    ("prog_fd", _u32), ("target_fd", _u32), ("attach_type", _u32), ("link_flags", _u32), ("flags", _u32),
    ("count", _u32), ("symbols", _u64), ("addresses", _u64), ("cookies", _u64),
)  # fmt: skip
UprobeMulti = _attr(
    ("prog_fd", _u32), ("target_fd", _u32), ("attach_type", _u32), ("link_flags", _u32), ("path", _u64),
    ("offsets", _u64), ("ref_ctr_offsets", _u64), ("cookies", _u64), ("count", _u32), ("flags", _u32), ("pid", _u32),
    ("pad", _u32),
)  # fmt: skip
BtfLoad = _attr(("btf", _u64), ("log", _u64), ("btf_size", _u32), ("log_size", _u32), ("log_level", _u32))
Stats = _attr(("type", _u32))
IterCreate = _attr(("link_fd", _u32), ("flags", _u32))
TestRun = _attr(
    ("prog_fd", _u32), ("retval", _u32), ("data_size_in", _u32), ("data_size_out", _u32), ("data_in", _u64),
    ("data_out", _u64), ("repeat", _u32), ("duration", _u32), ("ctx_size_in", _u32), ("ctx_size_out", _u32),
    ("ctx_in", _u64), ("ctx_out", _u64), ("flags", _u32), ("cpu", _u32),
)  # fmt: skip

MapInfoC = _attr(
    ("type", _u32), ("id", _u32), ("key_size", _u32), ("value_size", _u32), ("max_entries", _u32), ("map_flags", _u32),
    ("name", _name), ("ifindex", _u32), ("vmlinux_value", _u32), ("netns_dev", _u64), ("netns_ino", _u64),
    ("btf_id", _u32), ("btf_key_type_id", _u32), ("btf_value_type_id", _u32), ("pad", _u32), ("map_extra", _u64),
)  # fmt: skip
ProgInfoC = _attr(
    ("type", _u32), ("id", _u32), ("tag", ctypes.c_char * 8), ("jited_len", _u32), ("xlated_len", _u32),
    ("jited", _u64), ("xlated", _u64), ("load_time", _u64), ("created_by_uid", _u32), ("nr_map_ids", _u32),
    ("map_ids", _u64), ("name", _name), ("ifindex", _u32), ("gpl", _u32), ("netns_dev", _u64), ("netns_ino", _u64),
    ("nr_jited_ksyms", _u32), ("nr_jited_func_lens", _u32), ("jited_ksyms", _u64), ("jited_func_lens", _u64),
    ("btf_id", _u32), ("func_info_rec_size", _u32), ("func_info", _u64), ("nr_func_info", _u32), ("nr_line_info", _u32),
    ("line_info", _u64), ("jited_line_info", _u64), ("nr_jited_line_info", _u32), ("line_info_rec_size", _u32),
    ("jited_line_info_rec_size", _u32), ("nr_prog_tags", _u32), ("prog_tags", _u64), ("run_time_ns", _u64),
    ("run_cnt", _u64), ("recursion_misses", _u64),
    ("verified_insns", _u32), ("attach_btf_obj_id", _u32), ("attach_btf_id", _u32), ("pad", _u32),
)  # fmt: skip
LinkInfoC = _attr(("type", _u32), ("id", _u32), ("prog_id", _u32), ("pad", _u32), ("rest", ctypes.c_char * 64))
BtfInfoC = _attr(
    ("btf", _u64), ("btf_size", _u32), ("id", _u32), ("name", _u64), ("name_len", _u32), ("kernel_btf", _u32)
)

BPF_F_MULTI_RETURN = 1  # of kprobe.multi and uprobe.multi alike
PERF_EVENT_IOC_ENABLE = 0x2400
PERF_EVENT_IOC_DISABLE = 0x2401
PERF_EVENT_IOC_SET_BPF = 0x40042408
PERF_FLAG_FD_CLOEXEC = 8
PerfAttr = _attr(
    ("type", _u32), ("size", _u32), ("config", _u64), ("sample", _u64), ("sample_type", _u64), ("read_format", _u64),
    ("flags", _u64), ("wakeup_events", _u32), ("bp_type", _u32), ("config1", _u64), ("config2", _u64),
)  # fmt: skip
PERF_DISABLED, PERF_FREQ = 1, 1 << 10
