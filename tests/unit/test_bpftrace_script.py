"""What a script for bpftrace says of its maps."""

from __future__ import annotations

from probefleet_wire import bpftrace_script
from probefleet_wire.bpftrace_script import Kind, Map

SCRIPT = """
#!/usr/bin/env bpftrace
BEGIN { printf("Tracing @nothing = count()... Hit Ctrl-C\\n"); @start = nsecs; } // @comment = count()
kprobe:vfs_read /@start/ {
    @calls[comm, pid] = count();
    @bytes[arg[0]] = sum(arg2);
    @ = hist(arg2);
    @sizes = lhist(arg2, 0, 1000, 50);
    @most[tid] = max(arg2);
    @mean = avg(arg2);
    @all[comm] = stats(arg2);
    @n++;
    @at_start[tid] = nsecs;
    delete(@at_start[tid]);
}
END { clear(@start); if (@n == 3) { print(@n); } }
"""


def test_maps_are_found_with_their_kinds() -> None:
    found = {each.table: each for each in bpftrace_script.maps(SCRIPT)}
    assert found == {
        "start": Map("start", Kind.LATEST, False),
        "calls": Map("calls", Kind.COUNTER, True),
        "bytes": Map("bytes", Kind.COUNTER, True),
        "at": Map("", Kind.HIST, False),
        "sizes": Map("sizes", Kind.LHIST, False, 50),
        "most": Map("most", Kind.MAX, True),
        "mean": Map("mean", Kind.LATEST, False),
        "all": Map("all", Kind.STATS, True),
        "n": Map("n", Kind.COUNTER, False),
    }
    assert bpftrace_script.working(SCRIPT) == {"at_start"}


def test_maps_of_text_and_those_that_a_script_deletes_from_are_its_own_memory() -> None:
    script = """
    BEGIN { @names[0] = "zero"; @names[1] = "one"; }
    kprobe:f { @start[tid] = nsecs; @last[tid] = nsecs; @open[pid]++; }
    kretprobe:f /@start[tid]/ { printf("%s", @names[0]); delete(@start[tid]); delete(@open[pid]); }
    """
    assert bpftrace_script.maps(script) == (
        Map("last", Kind.LATEST, True),
        Map("open", Kind.COUNTER, True, deletes=True),
    )
    assert bpftrace_script.working(script) == {"start"}


def test_what_a_script_also_counts_down_is_no_counter() -> None:
    script = "kprobe:f { @open[pid]++; @room += arg1; @n++; } kretprobe:f { @open[pid]--; @room -= retval; }"
    assert [each.kind for each in bpftrace_script.maps(script)] == [Kind.LATEST, Kind.LATEST, Kind.COUNTER]
    script = "kprobe:f { ++@calls[pid]; ++@open; } kretprobe:f { --@open; }"
    assert bpftrace_script.maps(script) == (Map("calls", Kind.COUNTER, True), Map("open", Kind.LATEST, False))


def test_every_map_is_printed_between_marks() -> None:
    made = bpftrace_script.instrumented("kprobe:f { @a[comm] = count(); @ = hist(1); }")
    assert made.splitlines()[1].startswith("interval:s:1 { print(@a); print(@);")
    assert bpftrace_script.MARK in made


def test_lines_are_printed_where_the_script_says_so() -> None:
    assert bpftrace_script.prints('BEGIN { printf("x"); }')
    assert not bpftrace_script.prints('BEGIN { @a = count(); } // printf("x")')


def test_headers_of_the_kernel_are_left_out_and_lines_keep_their_numbers() -> None:
    script = "#!/usr/bin/bpftrace\n#include <linux/sched.h>\nkprobe:f { @ = count(); }"
    assert bpftrace_script.includes(script) and not bpftrace_script.includes("kprobe:f { @ = count(); }")
    assert bpftrace_script.instrumented(script).splitlines()[:3] == [
        "#!/usr/bin/bpftrace",
        "",
        "kprobe:f { @ = count(); }",
    ]
