"""Static probes of user space: programs written for libbpf's usdt.bpf.h, unchanged, with exact counts and arguments."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from probefleet_agent.errors import NoSuchTarget, ObjectError, UnsupportedFeature
from probefleet_agent.kernel import elf_file, features, links, pins, syscall, usdt
from probefleet_wire.v1 import plan_pb2

from tests.kernel import policies
from tests.kernel.support import Loaded, attachment
from tests.workloads import run

# As a user writes it: nothing in it is of Probefleet.
SOURCE = """
#include <bpf/usdt.bpf.h>
struct sums { u64 calls; s64 sum; u64 negative; u64 even; u64 arguments; };
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct sums); }
sums SEC(".maps");
static struct sums *found(void) { u32 zero = 0; return bpf_map_lookup_elem(&sums, &zero); }
SEC("usdt")
int BPF_USDT(on_one, int number)
{
	struct sums *sums = found();

	if (!sums)
		return 0;
	sums->calls++;
	sums->sum += number;
	sums->negative += number < 0;
	sums->arguments = bpf_usdt_arg_cnt(ctx);
	return 0;
}
SEC("usdt")
int BPF_USDT(on_two, long number, const char *text)
{
	struct sums *sums = found();
	char word[5] = {};

	if (!sums)
		return 0;
	bpf_probe_read_user_str(word, sizeof(word), text);
	sums->calls++;
	sums->sum += number;
	sums->negative += number < 0;
	sums->even += word[0] == 'e' && word[3] == 'n';
	sums->arguments = bpf_usdt_arg_cnt(ctx);
	return 0;
}
SEC("usdt")
int BPF_USDT(on_gc, int generation)
{
	struct sums *sums = found();

	if (!sums || bpf_get_current_pid_tgid() >> 32 != target_pid)
		return 0;
	sums->calls++;
	sums->sum += generation;
	return 0;
}
SEC("usdt")
int BPF_USDT(on_twelve, long a, long b, long c, long d, long e, long f, long g, long h, long i, long j, long k, long l)
{
	struct sums *sums = found();

	if (!sums)
		return 0;
	sums->calls++;
	/* Each has a weight of its own: one in another's place would be seen. */
	sums->sum += a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i + 10 * j + 11 * k;
	sums->even += l == 12;
	sums->negative += a < 0 && c < 0 && k < 0;
	sums->arguments = bpf_usdt_arg_cnt(ctx);
	return 0;
}
SEC("usdt")
int without_arguments(void *ctx) { return hit(); }
"""
COUNT = 997
NUMBERS = [-i if i % 23 == 0 else i for i in range(1, COUNT + 1)]
PYTHON = Path("/proc/self/exe").resolve()


def target(program: str, path: Path | str, provider: str, name: str, pid: int = 0) -> plan_pb2.Attachment:
    return attachment(program, usdt={"path": str(path), "provider": provider, "name": name, "pid": pid})


def sums(loaded: Loaded) -> dict[str, int]:
    _, values = loaded.rows("sums")
    names = ("calls", "sum", "negative", "even", "arguments")
    return dict(zip(names, np.ascontiguousarray(values).view(np.int64).reshape(-1).tolist(), strict=True))


@pytest.fixture
def marks() -> Iterator[run.Workload]:
    with run.start("marks", COUNT) as workload:
        yield workload


def loaded_for(*targets: plan_pb2.Attachment) -> Loaded:
    types = {each.program: links.program_type(each, "usdt") for each in targets}
    return Loaded(SOURCE, **{name: types.get(name, next(iter(types.values()))) for name in PROGRAMS})


PROGRAMS = ("on_one", "on_two", "on_gc", "on_twelve", "without_arguments")


@pytest.mark.shows("attach/usdt")
def test_one_argument_is_read_at_every_call(marks: run.Workload) -> None:
    wanted = target("on_one", run.build() / "marks", "marks", "one")
    assert links.supported(wanted) is None
    with loaded_for(wanted) as loaded:
        with links.attach(loaded.programs["on_one"], wanted) as link:
            assert link.way == f"usdt {run.build() / 'marks'}:marks:one"
            assert link.pinnable == features.perf_link()
            marks.go()
            assert marks.done() == {"calls": COUNT, "heard": 0}, "nobody listens to the other"
        assert sums(loaded) == {"calls": COUNT, "sum": sum(NUMBERS), "negative": COUNT // 23, "even": 0, "arguments": 1}


@pytest.mark.shows("attach/usdt")
def test_two_arguments_are_read_behind_their_semaphore(marks: run.Workload) -> None:
    wanted = target("on_two", run.build() / "marks", "marks", "two")
    with loaded_for(wanted) as loaded:
        with links.attach(loaded.programs["on_two"], wanted):
            marks.go()
            assert marks.done() == {"calls": COUNT, "heard": COUNT}
        even = COUNT // 2
        expected = {"calls": COUNT, "sum": sum(NUMBERS), "negative": COUNT // 23, "even": even, "arguments": 2}
        assert sums(loaded) == expected


def test_twelve_arguments_are_each_in_their_place(marks: run.Workload) -> None:
    """In registers, in memory and in the instruction; of four bytes and of eight."""
    wanted = target("on_twelve", run.build() / "marks", "marks", "twelve")
    with loaded_for(wanted) as loaded:
        with links.attach(loaded.programs["on_twelve"], wanted):
            marks.go()
            assert marks.done()["calls"] == COUNT
        squares = sum(i * i for i in range(1, 12))
        expected = {
            "calls": COUNT,
            "sum": squares * sum(NUMBERS),
            "negative": COUNT // 23,
            "even": COUNT,
            "arguments": 12,
        }
        assert sums(loaded) == expected


def test_two_probes_of_one_program_keep_their_arguments_apart(marks: run.Workload) -> None:
    one, two = (target(f"on_{name}", run.build() / "marks", "marks", name) for name in ("one", "two"))
    with (
        loaded_for(one, two) as loaded,
        links.attach(loaded.programs["on_one"], one),
        links.attach(loaded.programs["on_two"], two),
    ):
        marks.go()
        marks.done()
        found = sums(loaded)
        assert (found["calls"], found["sum"], found["even"]) == (2 * COUNT, 2 * sum(NUMBERS), COUNT // 2)


@pytest.mark.parametrize("mine", [True, False])
def test_one_process_is_told_from_others(marks: run.Workload, mine: bool) -> None:
    pid = marks.pid if mine else os.getpid()
    wanted = target("on_two", run.build() / "marks", "marks", "two", pid)
    with loaded_for(wanted) as loaded, links.attach(loaded.programs["on_two"], wanted):
        marks.go()
        marks.done()
        assert sums(loaded)["calls"] == (COUNT if mine else 0)


def test_a_program_without_arguments_needs_no_map(marks: run.Workload) -> None:
    wanted = target("without_arguments", run.build() / "marks", "marks", "one")
    with loaded_for(wanted) as loaded, links.attach(loaded.programs["without_arguments"], wanted):
        marks.go()
        marks.done()
        assert loaded.hits() == COUNT


def test_places_without_a_link_for_many_are_attached_one_by_one(
    marks: run.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "uprobe_multi", lambda: False)
    wanted = target("on_two", run.build() / "marks", "marks", "two")
    with loaded_for(wanted) as loaded, links.attach(loaded.programs["on_two"], wanted):
        marks.go()
        assert marks.done() == {"calls": COUNT, "heard": COUNT}
        assert (sums(loaded)["calls"], sums(loaded)["sum"]) == (COUNT, sum(NUMBERS))


def test_attaching_again_takes_the_entries_that_are_there() -> None:
    wanted = target("on_one", run.build() / "marks", "marks", "one")
    with loaded_for(wanted) as loaded:
        for _ in range(23):
            links.attach(loaded.programs["on_one"], wanted).close()
        rows = syscall.map_info(loaded.maps["__bpf_usdt_specs"]).max_entries
        _, values = loaded.rows("__bpf_usdt_specs")
        assert len(values) == rows == 256 and int(np.asarray(values).any(axis=1).sum()) == 1


def test_foreign_probes_count_exactly() -> None:
    """CPython's own: gc__start, with the generation, behind a semaphore that CPython asks."""
    with elf_file.open_file(PYTHON) as elf:
        if not any(each.name == "gc__start" for each in usdt.places(elf)):
            pytest.skip(f"{PYTHON} was built without static probes; Debian's /usr/bin/python3 has them")
    wanted = target("on_gc", PYTHON, "python", "gc__start")
    with loaded_for(wanted) as loaded:
        gc.disable()
        try:
            with links.attach(loaded.programs["on_gc"], wanted):
                for _ in range(23):
                    gc.collect(1)
            gc.collect(1)
        finally:
            gc.enable()
        assert (sums(loaded)["calls"], sums(loaded)["sum"]) == (23, 23)


def test_a_probe_that_is_not_there_names_those_near() -> None:
    path = run.build() / "marks"
    error = links.supported(target("p", path, "marks", "tow"))
    assert isinstance(error, NoSuchTarget) and "near: marks:two" in str(error)
    error = links.supported(target("p", "/usr/bin/env", "marks", "one"))
    assert isinstance(error, NoSuchTarget) and "no .note.stapsdt" in str(error)
    assert "no file /nowhere" in str(links.supported(target("p", "/nowhere", "marks", "one")))
    assert "not an ELF file" in str(links.supported(target("p", "/etc/passwd", "marks", "one")))


def test_before_cookies_a_file_that_is_loaded_anywhere_needs_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    library = "libstdc++.so.6"
    if links.supported(target("p", library, "libstdcxx", "throw")) is not None:
        pytest.skip(f"no {library} with static probes on this machine")
    monkeypatch.setattr(features, "cookies", lambda: False)
    error = links.supported(target("p", library, "libstdcxx", "throw"))
    assert isinstance(error, UnsupportedFeature) and "write pid" in str(error)
    assert links.supported(target("p", run.build() / "marks", "marks", "one")) is None


def test_a_pinned_probe_counts_on(root: pins.Root, marks: run.Workload) -> None:
    if not features.perf_link():
        return
    wanted = target("on_one", run.build() / "marks", "marks", "one")
    with loaded_for(wanted) as loaded:
        with links.attach(loaded.programs["on_one"], wanted) as link, root.staging("d1") as folder:
            folder.pin_link(0, "on_one", link.fd)
            folder.write_manifest(b"")
        marks.go()
        marks.done()
        assert sums(loaded)["calls"] == COUNT
        assert root.remove("d1")


POLICY = """
apiVersion: probefleet.io/v1alpha1
kind: ProbePolicy
metadata: {name: marks}
spec:
  scope: Cluster
  program:
    c:
      source: |
        #include <probefleet.h>
        #include <bpf/usdt.bpf.h>

        struct {
            __uint(type, BPF_MAP_TYPE_HASH);
            __uint(max_entries, 64);
            __type(key, u32);
            __type(value, u64);
        } remainders SEC(".maps");

        SEC("usdt/%s:marks:two")
        int BPF_USDT(on_two, long number, const char *text)
        {
            u32 remainder = (number < 0 ? -number : number) %% 5;
            u64 one = 1, *count = bpf_map_lookup_elem(&remainders, &remainder);

            if (count)
                __sync_fetch_and_add(count, 1);
            else
                bpf_map_update_elem(&remainders, &remainder, &one, BPF_NOEXIST);
            return 0;
        }
        char LICENSE[] SEC("license") = "GPL";
"""


def test_a_policy_is_attached_by_its_section_alone(marks: run.Workload, tmp_path: Path) -> None:
    """Through the sandboxed compiler, the planner and the engine; libbpf's own maps are nobody's output."""
    file = tmp_path / "marks.yaml"
    file.write_text(POLICY % (run.build() / "marks"))
    command = [sys.executable, "-m", "probefleet_cli.main", "run", str(file), "--output", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        pins_there = Path(f"/sys/fs/bpf/probefleet-run-{process.pid}/probefleet/instances")
        deadline = time.monotonic() + 60
        while not list(pins_there.glob("[0-9a-f]*/link_*")):  # bpffs tells nobody of new names
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        marks.go()
        assert marks.done() == {"calls": COUNT, "heard": COUNT}
        process.send_signal(signal.SIGINT)
        report = json.loads(process.communicate(timeout=60)[0])
    (output,) = report["status"]["outputs"]
    rows = {row["key"][0]: row["value"] for row in output["total"]["rows"]}
    assert rows == {str(rest): len([i for i in range(1, COUNT + 1) if i % 5 == rest]) for rest in range(5)}


def bcc_policy() -> policies.Manifest:
    """In BCC's dialect: what the three probes say, added up."""
    weighed = "\n".join(f"    bpf_usdt_readarg({i}, ctx, &number); sum += {i} * number;" for i in range(1, 12))
    source = f"""
#include <uapi/linux/ptrace.h>
BPF_HASH(sums, u32, s64, 64);
static inline void add(u32 key, s64 number)
{{
    s64 zero = 0, *sum = sums.lookup_or_try_init(&key, &zero);
    if (sum)
        __sync_fetch_and_add(sum, number);
}}
int on_one(struct pt_regs *ctx)
{{
    int number = 0;
    u64 none = 7;
    add(1, !bpf_usdt_readarg(1, ctx, &number));
    add(2, number);
    add(3, bpf_usdt_readarg(2, ctx, &none) < 0); /* it has one */
    return 0;
}}
int on_two(struct pt_regs *ctx)
{{
    s64 number = 0;
    char word[5] = {{}};
    bpf_usdt_readarg(1, ctx, &number);
    bpf_usdt_readarg_p(2, ctx, &word, sizeof(word));
    add(4, number);
    add(5, word[0] == 'e' && word[3] == 'n');
    return 0;
}}
int on_twelve(struct pt_regs *ctx)
{{
    s64 number = 0, sum = 0;
    u8 last = 0;
{weighed}
    bpf_usdt_readarg(12, ctx, &last);
    add(6, sum);
    add(7, last);
    return 0;
}}
"""
    made = policies.c_policy("")
    made["spec"] |= {
        "program": {"bcc": {"source": source}},
        "attach": [
            {
                "program": f"on_{name}",
                "usdt": {"path": str(run.build() / "marks"), "provider": "marks", "name": name},
            }
            for name in ("one", "two", "twelve")
        ],
        "outputs": [{"name": "sums", "from": {"map": "sums"}, "gauge": {"merge": "sum"}, "groupBy": ["key"]}],
    }
    return made


@pytest.mark.shows("attach/usdt")
@pytest.mark.parametrize("cookies", [True, False], ids=["by-cookie", "by-address"])
def test_programs_of_bcc_read_arguments_as_bcc_has_them_do(
    marks: run.Workload, monkeypatch: pytest.MonkeyPatch, cookies: bool
) -> None:
    if not cookies:  # as before Linux 5.15
        monkeypatch.setattr(features, "cookies", lambda: False)
    with policies.run(bcc_policy()) as running:
        marks.go()
        assert marks.done() == {"calls": COUNT, "heard": COUNT}
        assert running.rows("sums") == {
            ("1",): COUNT,
            ("2",): sum(NUMBERS),
            ("3",): COUNT,
            ("4",): sum(NUMBERS),
            ("5",): COUNT // 2,
            ("6",): sum(i * i for i in range(1, 12)) * sum(NUMBERS),
            ("7",): 12 * COUNT,
        }


def place(arguments: str) -> usdt.Place:
    return usdt.Place("p", "n", 0, 0, 0, arguments)


@pytest.mark.parametrize(
    ("text", "machine", "expected"),
    [
        ("", "x86_64", ()),
        ("-4@$-9", "x86_64", (usdt.Argument(usdt.Where.CONSTANT, 4, True, -9),)),
        ("8@%rax", "x86_64", (usdt.Argument(usdt.Where.REGISTER, 8, False, 0, 80),)),
        ("1@%sil", "x86_64", (usdt.Argument(usdt.Where.REGISTER, 1, False, 0, 104),)),
        ("2@%r15w", "x86_64", (usdt.Argument(usdt.Where.REGISTER, 2, False, 0, 0),)),
        ("-4@-1204(%rbp)", "x86_64", (usdt.Argument(usdt.Where.MEMORY, 4, True, -1204, 32),)),
        ("8@(%rsp)", "x86_64", (usdt.Argument(usdt.Where.MEMORY, 8, False, 0, 152),)),
        ("8@0x10(%r8)", "x86_64", (usdt.Argument(usdt.Where.MEMORY, 8, False, 16, 72),)),
        (
            "8@[sp, 16] -4@x3 4@7",
            "aarch64",
            (
                usdt.Argument(usdt.Where.MEMORY, 8, False, 16, 248),
                usdt.Argument(usdt.Where.REGISTER, 4, True, 0, 24),
                usdt.Argument(usdt.Where.CONSTANT, 4, False, 7),
            ),
        ),
        ("8@[x2]", "aarch64", (usdt.Argument(usdt.Where.MEMORY, 8, False, 0, 16),)),
    ],
)
def test_arguments_are_read_as_the_assembler_writes_them(
    text: str, machine: str, expected: tuple[usdt.Argument, ...]
) -> None:
    assert usdt.arguments_of(place(text), machine) == expected


@pytest.mark.parametrize(
    "text", ["8f@%xmm0", "8@foo+4(%rip)", "8@(%rdi,%rax,4)", "8@%xmm1", "3@%rax", " ".join(["8@%rax"] * 13)]
)
def test_arguments_that_no_program_can_read_are_refused(text: str) -> None:
    with pytest.raises(ObjectError, match=r"probe p:n"):
        usdt.arguments_of(place(text), "x86_64")
