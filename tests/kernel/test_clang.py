"""Policies in C are compiled locked in: right ones to the same bytes, wrong ones to words, and no file of the host."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from probefleet_wire import clang, sandbox
from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.elf import Elf

pytestmark = pytest.mark.compiles
TREE = Path(__file__).parents[2] / "bpf" / "include"
HEADERS = "<probefleet.h>, <probefleet_endpoints.h>, <probefleet_files.h>, <vmlinux.h> and <bpf/*.h>"
ONLY = f"is outside the header tree; only {HEADERS} may be included"
COUNTER = """
#include <probefleet.h>
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 997);
	__type(key, u32);
	__type(value, u64);
} execs SEC(".maps");
SEC("tracepoint/syscalls/sys_enter_execve") int on_exec(void *ctx)
{
	u32 user = bpf_get_current_uid_gid();

	probefleet_add(&execs, &user, 1);
	return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""


@pytest.fixture(params=["clang-14", "clang-19"])
def compiler(request: pytest.FixtureRequest) -> str:
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed; apt install {request.param} (Debian 12 has 14, 13 has 19)")
    return str(request.param)


def compiled(source: str, compiler: str, **limits: int) -> clang.Compiled:
    return clang.compile_core(
        source, name="slow.c", include_dirs=[TREE], clang=compiler, limits=sandbox.Limits(**limits)
    )


def refused(source: str, compiler: str, **limits: int) -> str:
    with pytest.raises(clang.CompileError) as caught:
        compiled(source, compiler, **limits)
    return str(caught.value)


def test_a_counter_compiles_and_says_what_it_holds(compiler: str) -> None:
    made = compiled(COUNTER, compiler)
    found = BpfObject.parse(made.object)
    assert [program.name for program in found.programs] == ["on_exec"]
    assert {"execs": 997}.items() <= {each.name: each.max_entries for each in found.maps}.items()
    assert made.warnings == ()


def test_the_same_source_gives_the_same_bytes_wherever_it_lies(compiler: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "include"
    shutil.copytree(TREE, elsewhere)
    here = compiled(COUNTER, compiler)
    there = clang.compile_core(COUNTER, name="slow.c", include_dirs=[elsewhere], clang=compiler)
    assert here.sha256 == there.sha256
    assert str(TREE).encode() not in here.object


def test_nodes_get_no_debug_sections(compiler: str) -> None:
    """They are nine tenths of what clang makes of vmlinux.h; the verifier's source lines are in BTF."""
    made = clang.compile_core(COUNTER, name="execs.c", include_dirs=[TREE], clang=compiler)
    assert not any("debug" in each.name for each in Elf.parse(made.object).sections)
    assert len(made.object) < 64 << 10
    assert BpfObject.parse(made.object).line_of("on_exec", 0), "lines are still there"


def test_warnings_come_with_the_object(compiler: str) -> None:
    (warning,) = compiled("int f(void)\n{\n\tint unused;\n\treturn 0;\n}\n", compiler).warnings
    assert (warning.file, warning.line, warning.column, warning.kind) == ("slow.c", 3, 6, "warning")
    assert "unused variable 'unused'" in warning.text


def test_an_error_points_into_the_policy(compiler: str) -> None:
    text = refused("int f(void)\n{\n\treturn missing + 1;\n}\n", compiler)
    place, line, caret = text.splitlines()
    assert place == "slow.c:3:9: error: use of undeclared identifier 'missing'"
    assert line.endswith("return missing + 1;")
    assert caret.index("^") == line.index("missing")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('int x;\n\n#include "/etc/shadow"\n', f"slow.c:3:10: error: #include of a host file: /etc/shadow {ONLY}"),
        ("#include </proc/self/environ>\n", f"slow.c:1:10: error: #include of a host file: /proc/self/environ {ONLY}"),
        ('#include "../../../../etc/passwd"\n', f"#include of a host file: ../../../../etc/passwd {ONLY}"),
        ('#define P "/etc/passwd"\n#include P\n', f"slow.c:2:10: error: #include of a host file: /etc/passwd {ONLY}"),
        (
            "#include <linux/sched.h>\n",
            f"slow.c:1:10: error: 'linux/sched.h' is not in the header tree; there are {HEADERS} "
            "(kernel types are all in vmlinux.h)",
        ),
        (
            'int x;\nasm(".incbin \\"/etc/passwd\\"");\n',
            "slow.c:2:1: error: .incbin of a host file: /etc/passwd is outside the header tree; "
            "assembly may read no files",
        ),
        (
            'int f(void) {\n\tasm volatile(".incbin \\"/etc/passwd\\"");\n\treturn 0;\n}\n',
            "slow.c:2:15: error: .incbin of a host file: /etc/passwd is outside the header tree",
        ),
        ('asm(".include \\"/etc/passwd\\"");\n', "slow.c:1:1: error: .include of a host file: /etc/passwd is outside"),
        ('#include "slow.c"\n', "slow.c:1:10: error: #include nested too deeply"),
        ("#error stop here\n", "slow.c:1:2: error: stop here"),
    ],
)
def test_files_of_the_host_are_out_of_reach(compiler: str, source: str, words: str) -> None:
    text = refused(source, compiler)
    assert words in text
    assert "root:" not in text


def test_embed_reads_no_file(compiler: str) -> None:
    text = refused('const char x[] = {\n#embed "/etc/passwd"\n};\n', compiler)
    assert text.startswith("slow.c:2:")
    assert "root:" not in text


def test_nobody_can_ask_whether_a_file_exists(compiler: str) -> None:
    source = (
        '#if __has_include("/etc/passwd")\nint there;\n#endif\n#if __has_include(<vmlinux.h>)\nint always;\n#endif\n'
    )
    names = [symbol.name for symbol in Elf.parse(compiled(source, compiler).object).symbols]
    assert ("there" in names, "always" in names) == (False, True)


def test_a_macro_bomb_is_stopped(compiler: str) -> None:
    lines = ["#define A0 x+x+x+x+x+x+x+x+x+x"]
    lines += [f"#define A{n} " + "+".join([f"A{n - 1}"] * 10) for n in range(1, 10)]
    text = refused(
        "\n".join(lines) + "\nint f(int x) { return A9; }\n", compiler, cpu_seconds=3, memory_bytes=400 << 20
    )
    assert "and was stopped: is there a macro or an #include that grows without end?" in text
    assert len(text) < 5000


def test_two_megabytes_of_diagnostics_become_a_page(compiler: str) -> None:
    line = '#define W _Pragma("GCC warning \\"' + "w" * 900 + '\\"")\n'
    text = refused(line + "W\n" * 2400, compiler)
    assert "the compiler printed more than 256 KiB and was stopped" in text
    assert len(text) <= clang.MAX_TEXT_BYTES + 200


def test_a_source_of_two_megabytes_is_refused_unread(compiler: str) -> None:
    assert refused("//" + "x" * (2 << 20), compiler) == "slow.c: error: the source has more than 512 KiB"


def test_a_missing_compiler_says_what_to_install() -> None:
    with pytest.raises(clang.ClangError, match="clang-99 is not installed"):
        compiled("", "clang-99")
