"""Functions of the kernel by trampolines and by patterns, and LSM hooks: exact counts, where the kernel has them.

Runs in a VM (`make test-vm`), on kernels with kprobes, fentry and BPF's LSM. kprobe.multi is there from 5.18 on where
it was built in (in Debian from 6.12 on); without it patterns are probed one by one, and the same counts come out.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from probefleet_agent.errors import NoSuchTarget, UnsupportedFeature, VerifierError
from probefleet_agent.kernel import btf_kernel, features, kernel_functions, links, links_function, symbols
from probefleet_wire.v1 import plan_pb2

from tests.kernel.support import Loaded, attachment, call_getppid, needs

pytestmark = pytest.mark.timeout(120)
libc = ctypes.CDLL(None)
GETPPID = {"x86_64": "__x64_sys_getppid", "aarch64": "__arm64_sys_getppid"}[os.uname().machine]
GETPRIORITY = {"x86_64": "__x64_sys_getpriority", "aarch64": "__arm64_sys_getpriority"}[os.uname().machine]
FENTRY = """
SEC("fentry")
int BPF_PROG(on_it) { return ours() ? hit() : 0; }
"""
# getpriority(PRIO_PROCESS, 0) answers 20 − nice.
FEXIT = f"""
SEC("fexit/{GETPRIORITY}")
int BPF_PROG(on_it, const struct pt_regs *regs, long answer) {{ return ours() && answer == 20 ? hit() : 0; }}
"""
BY_FUNCTION = """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1024); __type(key, u64); __type(value, u64); }
calls SEC(".maps");
SEC("kprobe")
int on_it(struct pt_regs *ctx)
{
	u64 function = bpf_get_func_ip(ctx), one = 1, *count;

	if (!ours())
		return 0;
	count = bpf_map_lookup_elem(&calls, &function);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&calls, &function, &one, BPF_NOEXIST);
	return 0;
}
"""
PATTERN = """
SEC("kprobe")
int on_it(struct pt_regs *ctx) { return ours() ? hit() : 0; }
"""
LSM = """
SEC("lsm/file_open")
int BPF_PROG(on_it, struct file *file, int verdict) { return ours() && !verdict ? hit() : 0; }
"""
LSM_DENIES = """
SEC("lsm/file_open")
int BPF_PROG(on_it, struct file *file, int verdict) { return ours() ? -1 : 0; }
"""


def call_getpriority(times: int) -> None:
    for _ in range(times):
        libc.getpriority(0, 0)


def count(source: str, target: plan_pb2.Attachment, work: Callable[[int], None], times: int) -> int:
    """Only what was made while attached may count."""
    assert links.supported(target, program_section="kprobe") is None
    with Loaded(source, target=target) as loaded:
        with links.attach(loaded.programs["on_it"], target):
            work(times)
        work(23)
        return loaded.hits()


@pytest.mark.parametrize("times", [997, 23])
@pytest.mark.shows("attach/fentry")
def test_fentry_counts_each_call(times: int) -> None:
    needs(features.fentry)
    assert count(FENTRY, attachment("on_it", fentry={"function": GETPRIORITY}), call_getpriority, times) == times


@pytest.mark.shows("attach/fexit")
def test_fexit_sees_the_result() -> None:
    needs(features.fentry)
    target = attachment("on_it", fentry={"function": GETPRIORITY, "on_return": True})
    assert count(FEXIT, target, call_getpriority, 997) == 997


def test_a_trampoline_is_a_link_that_can_be_pinned() -> None:
    target = attachment("on_it", fentry={"function": GETPRIORITY})
    with Loaded(FENTRY, target=target) as loaded, links.attach(loaded.programs["on_it"], target) as link:
        assert link.pinnable and len(link.fds) == 1 and link.way == f"fentry {GETPRIORITY}"


def refused(target: plan_pb2.Attachment) -> str:
    error = links.supported(target, program_section="kprobe")
    assert isinstance(error, NoSuchTarget), error
    return str(error)


def test_functions_that_cannot_be_traced_say_why() -> None:
    assert "near: tcp_sendmsg" in refused(attachment("p", fentry={"function": "tcp_sendmsgs"}))
    # Its other name, __ia32_sys_getppid, is the one that BTF has; assembly it does not describe at all.
    assert "BTF does not describe it" in refused(attachment("p", fentry={"function": "entry_SYSCALL_64"}))
    names = symbols.kallsyms().names.decode().split()
    twice = next(name for name in ("cleanup_module", "type_show", "name_show") if names.count(name) > 1)
    assert "functions of that name" in refused(attachment("p", fentry={"function": twice}))
    inlined = next(name for name in ("bpf_prog_run", "tcp_sk", "get_current") if name not in names)
    assert "no function" in refused(attachment("p", fentry={"function": inlined}))


def test_notrace_is_said() -> None:
    there = btf_kernel.functions() & symbols.kallsyms().functions()
    listed = {line.partition(b" ")[0].decode() for line in kernel_functions._filter_functions().splitlines()}
    some = sorted(there - listed)[:20]
    assert any("notrace" in refused(attachment("p", fentry={"function": name})) for name in some)


@pytest.mark.parametrize("on_return", [False, True])
@pytest.mark.shows("attach/kprobe by pattern")
def test_a_pattern_counts_every_function_that_fits(on_return: bool) -> None:
    needs(features.kprobes)
    # getppid and getpriority and their like: called here alone in this process, so many times each.
    target = attachment(
        "on_it", kprobe_pattern={"pattern": GETPPID.replace("getppid", "getp?i*"), "on_return": on_return}
    )
    assert {GETPPID, GETPRIORITY} < set(kernel_functions.matching(target.kprobe_pattern.pattern))

    def work(times: int) -> None:
        call_getppid(times)
        call_getpriority(times)

    assert count(PATTERN, target, work, 499) == 998


def test_a_pattern_tells_its_functions_apart() -> None:
    needs(features.cookies)  # bpf_get_func_ip() came with them, in Linux 5.15
    target = attachment("on_it", kprobe_pattern={"pattern": GETPPID.replace("getppid", "get*")})
    with Loaded(BY_FUNCTION, target=target) as loaded:
        with links.attach(loaded.programs["on_it"], target) as link:
            call_getppid(997)
            call_getpriority(23)
            assert ("kprobe.multi" in link.way) == features.kprobe_multi()
        keys, values = loaded.rows("calls")
    names = symbols.kallsyms().resolve(np.ascontiguousarray(keys).view(np.uint64).reshape(-1))
    # Of several names the first: __ia32_sys_getppid is __x64_sys_getppid.
    calls = (name.partition("_sys_")[2] for name in names)
    found = dict(zip(calls, values.view(np.uint64).reshape(-1).tolist(), strict=True))
    assert (found["getppid"], found["getpriority"]) == (997, 23)


def test_one_by_one_gives_the_same_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "kprobe_multi", lambda: False)
    target = attachment("on_it", kprobe_pattern={"pattern": GETPPID.replace("getppid", "getp?i*")})
    assert count(PATTERN, target, call_getppid, 997) == 997
    with Loaded(PATTERN, target=target) as loaded, links.attach(loaded.programs["on_it"], target) as link:
        assert link.way.startswith("kprobe ") and " functions)" in link.way
        assert bool(link.fds) == features.perf_link()


def test_too_many_one_by_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "kprobe_multi", lambda: False)
    error = links.supported(attachment("p", kprobe_pattern={"pattern": "*"}))
    assert isinstance(error, UnsupportedFeature)
    assert f"at most {links_function.MAX_ONE_BY_ONE:,}" in str(error) and "Narrow it" in str(error)


def test_a_pattern_that_fits_nothing_names_those_near() -> None:
    assert "no function that fits tcp_sendmsgs*" in refused(
        attachment("p", kprobe_pattern={"pattern": "tcp_sendmsgs*"})
    )


def open_files(times: int) -> None:
    for _ in range(times):
        os.close(os.open("/proc/self/stat", os.O_RDONLY))


@pytest.mark.shows("attach/lsm")
def test_an_lsm_hook_is_watched_exactly() -> None:
    needs(features.fentry)
    assert count(LSM, attachment("on_it", lsm={"hook": "file_open"}), open_files, 997) == 997


def test_an_lsm_program_that_would_deny_cannot() -> None:
    """The kernel uses no answer of it; since Linux 6.8 the verifier refuses any but 0 (before, it missed branches)."""
    target = attachment("on_it", lsm={"hook": "file_open"})
    try:
        with Loaded(LSM_DENIES, target=target) as loaded, links.attach(loaded.programs["on_it"], target):
            assert Path("/proc/self/stat").read_text()
    except VerifierError as error:
        assert "may not return" in str(error) and "return 0" in str(error)


def test_an_lsm_hook_that_is_not_there_names_those_near() -> None:
    assert "no LSM hook file_opened" in refused(attachment("p", lsm={"hook": "file_opened"}))
