"""The gate: what goes in is checked, what comes out has one owner, errors say what to do."""

from __future__ import annotations

import errno
import gc
import os

import pytest
from probefleet_agent.errors import KernelError, ProbefleetError, VerifierError
from probefleet_agent.kernel import btf_kernel, features, links, maps, syscall
from probefleet_agent.kernel.uapi import MapType, ProgramType

from tests.kernel.support import Loaded, attachment, call_getppid, needs


def test_a_forgotten_descriptor_warns_and_is_closed() -> None:
    fd = syscall.map_create(MapType.ARRAY, key_size=4, value_size=8, max_entries=1, name="forgotten")
    number = fd.fileno()
    with pytest.warns(ResourceWarning, match="unclosed .*map forgotten"):
        del fd
        gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_closed_descriptor_says_so() -> None:
    fd = syscall.map_create(MapType.ARRAY, key_size=4, value_size=8, max_entries=1, name="m")
    with fd.dup() as other:
        fd.close()
        fd.close()
        assert fd.closed and not other.closed
        assert syscall.map_info(other).name == "m"
    with pytest.raises(ValueError, match="descriptor of map m is closed"):
        syscall.map_info(fd)


def test_impossible_maps_are_refused_with_their_sizes() -> None:
    with pytest.raises(KernelError, match=r"create map 'x' \(type 1, key 0, value 8 bytes, 1 entries\)") as caught:
        syscall.map_create(MapType.HASH, key_size=0, value_size=8, max_entries=1, name="x")
    assert caught.value.errno == errno.EINVAL
    assert caught.value.reason == "KernelRefused"


def test_a_map_is_described_as_it_was_made() -> None:
    with syscall.map_create(
        MapType.HASH, key_size=12, value_size=40, max_entries=997, name="a name-too-long-for-it", flags=1
    ) as fd:
        info = syscall.map_info(fd)
    assert (info.type, info.key_size, info.value_size, info.max_entries, info.flags) == (1, 12, 40, 997, 1)
    assert info.name == "a_name_too_long"


def test_a_program_loads_and_is_described() -> None:
    with syscall.prog_load(features.RETURN_ZERO, ProgramType.RAW_TRACEPOINT, name="nothing") as fd:
        info = syscall.program_info(fd)
        assert (info.type, info.name, info.map_ids) == (ProgramType.RAW_TRACEPOINT, "nothing", ())
        assert info.id in syscall.ids("program")
        with syscall.fd_by_id("program", info.id) as again:
            assert syscall.program_info(again).tag == info.tag


def test_a_refused_program_carries_the_verifiers_log() -> None:
    exit_without_r0 = features.RETURN_ZERO[8:]
    with pytest.raises(VerifierError, match=r"verifier refused bad: .*Give it a value") as caught:
        syscall.prog_load(exit_without_r0, ProgramType.RAW_TRACEPOINT, name="bad")
    assert "R0 !read_ok" in caught.value.log
    assert caught.value.instructions == 1
    assert caught.value.reason == "VerifierRefused"


@pytest.mark.parametrize("code", [b"", b"123", features.RETURN_ZERO + b"x"])
def test_half_instructions_never_reach_the_kernel(code: bytes) -> None:
    with pytest.raises(ProbefleetError, match="whole instructions"):
        syscall.prog_load(code, ProgramType.RAW_TRACEPOINT)


def test_an_unknown_id_is_not_there() -> None:
    with pytest.raises(KernelError) as caught:
        syscall.fd_by_id("map", 0x7FFFFFFF)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.shows("besides/cost")
def test_statistics_count_each_run() -> None:
    needs(features.bpf_stats)
    source = 'SEC("tracepoint/syscalls/sys_enter_getppid") int on_it(void *ctx) { return hit(); }'
    target = attachment("on_it", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})
    with Loaded(source) as loaded, syscall.enable_stats(), links.attach(loaded.programs["on_it"], target):
        before = loaded.hits()
        call_getppid(997)
        info = syscall.program_info(loaded.programs["on_it"])
        assert info.run_count >= 997 and info.run_time_ns > 997
        assert loaded.hits() - before >= 997
        assert info.map_ids and maps.info(loaded.maps["hits"]).id in info.map_ids


def test_btf_of_a_map_comes_back() -> None:
    source = """
    struct some_key { u32 a; u64 b; };
    struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, struct some_key);
    __type(value, u64); } typed SEC(".maps");
    SEC("raw_tracepoint/sys_enter") int on_it(void *ctx) { return hit(); }
    """
    with Loaded(source) as loaded:
        info = syscall.map_info(loaded.maps["typed"])
        with syscall.fd_by_id("btf", info.btf_id) as fd:
            btf = btf_kernel.for_fd(fd)
    assert btf.c_name_of(info.btf_key_type_id) == "struct some_key"
    assert btf.size_of(info.btf_key_type_id) == info.key_size == 16


def test_an_event_has_a_frequency_or_a_period() -> None:
    with pytest.raises(ProbefleetError, match="not both"):
        syscall.perf_event_open(1, 0, frequency_hz=99, period=1)
    with pytest.raises(KernelError, match="open the perf event nonsense"):
        syscall.perf_event_open(9999, 0, cpu=0, what="nonsense")
