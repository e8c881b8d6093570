"""Every kind of target counts exactly what the workload made."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from pathlib import Path

import pytest
from probefleet_agent.errors import KernelError, NoSuchTarget, ObjectError, UnsupportedFeature
from probefleet_agent.kernel import (
    elf_file,
    features,
    links,
    links_network,
    links_perf,
    maps,
    mounts,
    pins,
    syscall,
)
from probefleet_agent.kernel import spread as spread_module
from probefleet_wire.v1 import plan_pb2

from tests.kernel.support import Loaded, attachment, call_getppid, needs, wait_until

GETPPID = {"x86_64": 110, "aarch64": 173}[os.uname().machine]
RAW = f"""
SEC("raw_tracepoint/sys_enter")
int on_it(struct bpf_raw_tracepoint_args *ctx)
{{
	return ours() && ctx->args[1] == {GETPPID} ? hit() : 0;
}}
"""
TRACEPOINT = """
SEC("tracepoint/syscalls/sys_enter_getppid")
int on_it(void *ctx)
{
	return ours() ? hit() : 0;
}
"""
TP_BTF = f"""
SEC("tp_btf/sys_enter")
int BPF_PROG(on_it, struct pt_regs *regs, long id)
{{
	return ours() && id == {GETPPID} ? hit() : 0;
}}
"""
UPROBE = """
SEC("uprobe")
int on_it(void *ctx)
{
	return ours() ? hit() : 0;
}
"""
PERF = """
SEC("perf_event")
int on_it(void *ctx)
{
	return hit();
}
"""
KPROBE = """
SEC("kprobe")
int on_it(void *ctx)
{
	return ours() ? hit() : 0;
}
"""
libc = ctypes.CDLL("libc.so.6")


def libc_path() -> str:
    with open("/proc/self/maps") as file:
        return next(line.split()[-1] for line in file if "/libc.so.6" in line or "/libc-2" in line)


def count(source: str, target: plan_pb2.Attachment, work: object, times: int) -> int:
    """Attach, work, detach, work again: only what was made while attached may count."""
    assert callable(work)
    with Loaded(source) as loaded:
        with links.attach(loaded.programs["on_it"], target, program_section=loaded.sections["on_it"]):
            work(times)
        work(23)
        return loaded.hits()


@pytest.mark.parametrize("times", [997, 23])
@pytest.mark.shows("attach/rawTracepoint")
def test_raw_tracepoint_counts_each_call(times: int) -> None:
    assert count(RAW, attachment("on_it", raw_tracepoint={"name": "sys_enter"}), call_getppid, times) == times


@pytest.mark.parametrize("times", [997, 23])
@pytest.mark.shows("attach/tracepoint")
def test_tracepoint_counts_each_call(times: int) -> None:
    target = attachment("on_it", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})
    assert count(TRACEPOINT, target, call_getppid, times) == times


@pytest.mark.parametrize("times", [997, 23])
@pytest.mark.shows("attach/tpBtf")
def test_tp_btf_counts_each_call(times: int) -> None:
    needs(features.tp_btf)
    assert count(TP_BTF, attachment("on_it", tp_btf={"name": "sys_enter"}), call_getppid, times) == times


@pytest.mark.parametrize("on_return", [False, True])
@pytest.mark.shows("attach/syscall")
def test_syscall_is_its_tracepoint_for_a_tracepoint_program(on_return: bool) -> None:
    target = attachment("on_it", syscall={"name": "getppid", "on_return": on_return})
    assert count(TRACEPOINT, target, call_getppid, 997) == 997


UPROBES = [
    pytest.param(False, marks=pytest.mark.shows("attach/uprobe")),
    pytest.param(True, marks=pytest.mark.shows("attach/uretprobe")),
]


def call_labs(times: int) -> None:
    for _ in range(times):
        libc.labs(-1)


@pytest.mark.parametrize("on_return", UPROBES)
def test_uprobe_by_symbol_counts_each_call(on_return: bool) -> None:
    target = attachment("on_it", uprobe={"path": libc_path(), "symbol": "labs", "on_return": on_return})
    assert count(UPROBE, target, call_labs, 997) == 997


@pytest.mark.parametrize("on_return", UPROBES)
def test_uprobe_by_offset_counts_each_call(on_return: bool) -> None:
    with elf_file.open_file(Path(libc_path())) as elf:
        offset = elf.file_offset("labs")
    target = attachment("on_it", uprobe={"path": libc_path(), "offset": offset, "on_return": on_return})
    assert count(UPROBE, target, call_labs, 23) == 23


@pytest.mark.shows("attach/library by name")
@pytest.mark.parametrize("name", ["libc", "c", "libc.so.6"])
@pytest.mark.parametrize("root", ["", "/proc/self/root"], ids=["own-files", "the-nodes-files"])
def test_a_library_is_found_by_its_name(name: str, root: str) -> None:
    target = attachment("on_it", uprobe={"path": name, "symbol": "labs"})
    assert links.supported(target, root=root) is None
    with Loaded(UPROBE) as loaded, links.attach(loaded.programs["on_it"], target, root=root):
        call_labs(997)
        assert loaded.hits() == 997


def test_uprobe_of_one_process_leaves_others_alone() -> None:
    other = attachment("on_it", uprobe={"path": libc_path(), "symbol": "labs", "pid": 1})
    mine = attachment("on_it", uprobe={"path": libc_path(), "symbol": "labs", "pid": os.getpid()})
    assert count(UPROBE, other, call_labs, 23) == 0
    assert count(UPROBE, mine, call_labs, 23) == 23


def test_uprobe_paths_are_the_nodes_when_a_root_is_given() -> None:
    target = attachment("on_it", uprobe={"path": libc_path(), "symbol": "labs"})
    with Loaded(UPROBE) as loaded, links.attach(loaded.programs["on_it"], target, root="/proc/self/root/") as link:
        call_labs(23)
        assert loaded.hits() == 23
        assert link.way == f"uprobe /proc/self/root{libc_path()}:labs"
    assert "no file /nowhere/" in str(links.supported(target, root="/nowhere"))


@pytest.mark.shows("attach/perfEvent")
def test_perf_event_runs_on_every_cpu_by_period() -> None:
    """cpu-clock every million ns of CPU time: a busy loop gives about a thousand a second."""
    with Loaded(PERF) as loaded:
        target = attachment("on_it", perf_event={"event": "cpu-clock", "period": 1_000_000})
        with links.attach(loaded.programs["on_it"], target) as link:
            assert len(link.fds) == os.cpu_count() if features.perf_link() else len(link.keeps) == os.cpu_count()
            wait_until(lambda: loaded.hits() >= 997)
        after = loaded.hits()
        sum(range(3_000_000))
        assert loaded.hits() == after


def test_a_cpu_that_comes_online_gets_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    online = [0]
    monkeypatch.setattr(maps, "online_cpus", lambda: list(online))
    target = attachment("on_it", perf_event={"event": "cpu-clock", "period": 1_000_000})
    with Loaded(PERF) as loaded:
        spread = links.spread(loaded.programs["on_it"], target, links_network.Surroundings())
        assert spread is not None and spread.pinnable == features.perf_link()
        assert spread.follow({}, 1).came == ("CPU 0",)
        assert spread.follow({}, 2) == spread_module.Changes((), ())
        online.append(1)
        assert spread.follow({}, 3).came == ("CPU 1",)
        assert spread.way == "perf_event cpu-clock every 1000000 on CPU 0, CPU 1"
        try:
            for cpu in (0, 1):
                os.sched_setaffinity(0, {cpu})
                before = loaded.hits_of(cpu)
                wait_until(lambda cpu=cpu, before=before: loaded.hits_of(cpu) > before + 23)
        finally:
            os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
        online.remove(1)
        assert spread.follow({}, 4).gone == (1,)
        spread.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1-dcache-loads", (3, 0x0)),
        ("l1-dcache-load-misses", (3, 0x10000)),
        ("llc-store-misses", (3, 0x10102)),
        ("node-prefetches", (3, 0x206)),
        ("r01c2", (4, 0x1C2)),
        ("cpu-clock", (1, 0)),
    ],
)
def test_events_are_numbered_as_the_kernel_numbers_them(name: str, expected: tuple[int, int]) -> None:
    """By include/uapi/linux/perf_event.h: cache | operation << 8 | result << 16."""
    assert links_perf.event(name) == expected


@pytest.mark.parametrize("name", ["llc-load-misses", "r01c2"])
def test_a_cache_event_that_the_machine_lacks_is_unsupported(name: str) -> None:
    if features.hardware_counters():
        return
    with Loaded(PERF) as loaded, pytest.raises(UnsupportedFeature, match=f"perf event {name}"):
        links.attach(loaded.programs["on_it"], attachment("p", perf_event={"event": name, "period": 1000}))


@pytest.mark.shows("attach/perfEvent")
def test_page_faults_are_counted_one_by_one() -> None:
    """A software event with period 1 is exact: one for each page that is touched for the first time."""
    source = 'SEC("perf_event") int on_it(void *ctx) { return ours() ? hit() : 0; }'
    import mmap

    with Loaded(source) as loaded:
        target = attachment("on_it", perf_event={"event": "page-faults", "period": 1})
        with mmap.mmap(-1, 997 * 4096) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            with links.attach(loaded.programs["on_it"], target):
                for page in range(997):
                    memory[page * 4096] = 1
        assert 997 <= loaded.hits() <= 997 + 50  # the interpreter has faults of its own


def test_links_are_pinnable_where_the_kernel_has_perf_links() -> None:
    with Loaded(TRACEPOINT) as loaded:
        target = attachment("on_it", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})
        with links.attach(loaded.programs["on_it"], target) as link:
            assert link.pinnable == features.perf_link()
            assert link.way == "tracepoint syscalls:sys_enter_getppid"
            if link.pinnable:
                assert syscall.link_info(link.fd).prog_id == syscall.program_info(loaded.programs["on_it"]).id


def test_a_kernel_without_perf_links_falls_back_to_the_event_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "perf_link", lambda: False)
    target = attachment("on_it", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})
    assert count(TRACEPOINT, target, call_getppid, 997) == 997
    with Loaded(TRACEPOINT) as loaded, links.attach(loaded.programs["on_it"], target) as link:
        assert not link.pinnable and not link.fds and len(link.keeps) == 1


def pin_attached(which: str, bpffs: Path, pid: int, path: str) -> None:
    """In a process of its own: attach, pin all of it, and end. It counts what the process `pid` does."""
    source, target = {
        "uprobe": (UPROBE, {"uprobe": {"path": path, "symbol": "labs"}}),
        "tracepoint": (TRACEPOINT, {"tracepoint": {"category": "syscalls", "name": "sys_enter_getppid"}}),
        "raw_tracepoint": (RAW, {"raw_tracepoint": {"name": "sys_enter"}}),
        "tp_btf": (TP_BTF, {"tp_btf": {"name": "sys_enter"}}),
        "perf_event": (PERF, {"perf_event": {"event": "cpu-clock", "frequency_hz": 997}}),
    }[which]
    with (
        Loaded(source, pid=pid) as loaded,
        links.attach(loaded.programs["on_it"], attachment("on_it", **target)) as link,
        pins.root(bpffs).staging("d1") as folder,
    ):
        for number, fd in enumerate(link.fds):
            folder.pin_link(number, "on_it", fd)
        folder.pin_map("hits", loaded.maps["hits"])
        folder.pin_program("on_it", loaded.programs["on_it"])
        folder.write_manifest(b"made by a process that is gone")


OUTLIVES = pytest.mark.shows("attach/pinned links outlive the agent")


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("uprobe", marks=OUTLIVES),
        "tracepoint",
        pytest.param("raw_tracepoint", marks=OUTLIVES),
        "tp_btf",
        "perf_event",
    ],
)
def test_pinned_links_outlive_the_process_that_made_them(root: pins.Root, which: str) -> None:
    if which not in ("raw_tracepoint", "tp_btf"):
        needs(features.perf_link)
    if which == "tp_btf":
        needs(features.tp_btf)
    context = multiprocessing.get_context("fork")  # a new Python takes half a minute of an emulated CPU
    arguments = (which, root.path.parent, os.getpid(), libc_path())
    maker = context.Process(target=pin_attached, args=arguments, daemon=True)
    maker.start()
    maker.join(60)
    assert maker.exitcode == 0
    maker.close()
    with root.open_instance("d1") as adopted:
        assert adopted.manifest == b"made by a process that is gone"
        before = int(maps.sum_lost(adopted.maps["hits"])[0])
        if which == "perf_event":
            assert len(adopted.links["on_it"]) == os.cpu_count()
            wait_until(lambda: int(maps.sum_lost(adopted.maps["hits"])[0]) >= before + 23)
            return
        (call_labs if which == "uprobe" else call_getppid)(997)
        assert int(maps.sum_lost(adopted.maps["hits"])[0]) == before + 997
    with root.open_instance("d1") as adopted:
        hits = adopted.maps["hits"].dup()
        link = syscall.link_info(adopted.links["on_it"][0]).id
    with hits:
        assert root.remove("d1")
        wait_until(lambda: link not in syscall.ids("link"))  # before Linux 6.9 the kernel takes some milliseconds
        (call_labs if which == "uprobe" else call_getppid)(23)
        assert int(maps.sum_lost(hits)[0]) == before + 997, "removing the pins detaches"


KPROBES = [
    pytest.param(False, marks=pytest.mark.shows("attach/kprobe")),
    pytest.param(True, marks=pytest.mark.shows("attach/kretprobe")),
]
HANDLER = {"x86_64": "__x64_sys_getppid", "aarch64": "__arm64_sys_getppid"}[os.uname().machine]


@pytest.mark.parametrize("on_return", KPROBES)
def test_kprobes_count_exactly(on_return: bool) -> None:
    needs(features.kprobes)
    target = attachment("on_it", kprobe={"function": HANDLER, "on_return": on_return})
    assert links.supported(target) is None
    assert count(KPROBE, target, call_getppid, 997) == 997


@pytest.mark.parametrize("on_return", [False, True])
def test_without_kprobes_they_are_refused_in_words(on_return: bool) -> None:
    if features.kprobes():
        return
    target = attachment("on_it", kprobe={"function": HANDLER, "on_return": on_return})
    refusal = links.supported(target)
    assert isinstance(refusal, UnsupportedFeature)
    assert str(refusal).startswith("this kernel has no kprobes: it was built without CONFIG_KPROBES")
    with Loaded(KPROBE) as loaded, pytest.raises(UnsupportedFeature, match="kprobes"):
        links.attach(loaded.programs["on_it"], target)


@pytest.mark.parametrize("on_return", KPROBES)
def test_syscall_is_a_kprobe_on_its_handler_for_a_kprobe_program(on_return: bool) -> None:
    needs(features.kprobes)
    target = attachment("on_it", syscall={"name": "getppid", "on_return": on_return})
    assert count(KPROBE, target, call_getppid, 23) == 23


def test_without_kprobes_a_system_call_takes_no_kprobe_program() -> None:
    if features.kprobes():
        return
    for on_return in (False, True):
        target = attachment("on_it", syscall={"name": "getppid", "on_return": on_return})
        assert isinstance(links.supported(target, program_section="kprobe"), UnsupportedFeature)


def refused(target: plan_pb2.Attachment, section: str = "") -> str:
    error = links.supported(target, program_section=section)
    assert isinstance(error, NoSuchTarget), error
    assert error.reason == "NoSuchAttachPoint"
    return str(error)


def test_a_misspelt_tracepoint_names_those_near() -> None:
    said = refused(attachment("p", tracepoint={"category": "syscalls", "name": "sys_enter_exeve"}))
    assert said.startswith(
        "no tracepoint syscalls:sys_enter_exeve on this kernel; near: sys_enter_execve, sys_enter_execveat"
    )


def test_a_misspelt_category_names_those_near() -> None:
    assert "sched:sched_switch" in refused(attachment("p", tracepoint={"category": "shed", "name": "sched_switch"}))


def test_a_path_in_a_tracepoints_name_is_no_way_out_of_tracefs() -> None:
    assert "no tracepoint" in refused(attachment("p", tracepoint={"category": "../../..", "name": "etc"}))


def test_a_misspelt_raw_tracepoint_names_those_near() -> None:
    with (
        Loaded(RAW) as loaded,
        pytest.raises(NoSuchTarget, match=r"no raw tracepoint sched_swich .*: sched_switch"),
    ):
        links.attach(loaded.programs["on_it"], attachment("p", raw_tracepoint={"name": "sched_swich"}))


def test_a_misspelt_raw_tracepoint_is_known_before_loading() -> None:
    assert "sched_switch" in refused(attachment("p", raw_tracepoint={"name": "sched_swich"}))
    assert links.supported(attachment("p", raw_tracepoint={"name": "sched_switch"})) is None


def test_a_misspelt_tp_btf_is_known_before_loading() -> None:
    needs(features.tp_btf)
    assert "sched_switch" in refused(attachment("p", tp_btf={"name": "sched_swich"}))


def test_a_misspelt_symbol_names_those_near() -> None:
    said = refused(attachment("p", uprobe={"path": libc_path(), "symbol": "mallc"}))
    assert said.startswith(f"no function mallc in {libc_path()}; near:") and "malloc" in said


def test_a_file_that_is_not_there_and_one_that_is_no_program() -> None:
    assert refused(attachment("p", uprobe={"path": "/nowhere", "symbol": "x"})) == "no file /nowhere on this node"
    assert "not an ELF file" in refused(attachment("p", uprobe={"path": "/etc/passwd", "symbol": "x"}))
    assert "no library or program nowhere" in refused(attachment("p", uprobe={"path": "nowhere", "symbol": "x"}))


def test_an_offset_outside_code_is_refused() -> None:
    assert "no code at offset 0x1" in refused(attachment("p", uprobe={"path": libc_path(), "offset": 1}))


def test_an_unknown_event_names_those_near() -> None:
    assert "near: cpu-clock" in refused(attachment("p", perf_event={"event": "cpu-clok", "period": 1}))


def test_a_hardware_event_that_the_machine_lacks_is_unsupported() -> None:
    if features.hardware_counters():
        return
    with Loaded(PERF) as loaded, pytest.raises(UnsupportedFeature, match="cpu-clock works everywhere"):
        links.attach(loaded.programs["on_it"], attachment("p", perf_event={"event": "cpu-cycles", "period": 1000}))


def test_a_program_of_the_wrong_kind_is_refused_with_advice() -> None:
    with Loaded(PERF) as loaded, pytest.raises(KernelError, match=r"Is the program of the kind"):
        target = attachment("p", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})
        links.attach(loaded.programs["on_it"], target)


def test_a_program_that_reads_registers_from_a_tracepoint_is_told_so() -> None:
    source = TRACEPOINT.replace("ours()", "((volatile unsigned long *)ctx)[20]")
    with Loaded(source) as loaded, pytest.raises(ObjectError, match=r"past the end of its record.*needs a kprobe"):
        target = attachment("p", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})
        links.attach(loaded.programs["on_it"], target)


def test_tracefs_is_found() -> None:
    assert mounts.tracefs() is not None
