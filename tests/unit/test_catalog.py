"""The catalog: probe.yaml and object must fit, and parameters say what is wrong with a value."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from probefleet_core import catalog, values
from probefleet_core.parameters import Parameter, ParameterError, ParameterType
from probefleet_wire import syscalls
from probefleet_wire.bpf_object import BpfObject

ROOT = Path(__file__).parents[2]
NAMES = (
    "biolatency",
    "cachestat",
    "execsnoop",
    "filetop",
    "offcputime",
    "opensnoop",
    "profile",
    "runqlat",
    "syscount",
    "tcpconnlat",
    "tcplife",
    "tcpretrans",
    "tcptop",
)


@pytest.fixture(scope="module")
def loaded() -> catalog.Catalog:
    return catalog.load(ROOT / "bpf")


def probe(loaded: catalog.Catalog, name: str) -> catalog.Probe:
    found = loaded.get(name)
    assert found is not None
    return found


def bits(bitmap: bytes) -> set[int]:
    number = int.from_bytes(bitmap, "little")
    return {bit for bit in range(len(bitmap) * 8) if number >> bit & 1}


def test_the_catalog_holds_every_folder_with_a_probe_yaml(loaded: catalog.Catalog) -> None:
    assert loaded.names == NAMES == tuple(each.name for each in loaded)
    assert loaded.get("nothing") is None


@pytest.mark.parametrize("name", NAMES)
def test_every_probe_keys_by_cgroup_asks_the_filter_and_counts_losses(loaded: catalog.Catalog, name: str) -> None:
    compiled = BpfObject.parse(probe(loaded, name).elf)
    assert compiled.btf is not None
    maps = {each.name: each for each in compiled.maps}
    assert {"probefleet_lost", "probefleet_filter"} <= set(maps)
    for output in probe(loaded, name).outputs:
        definition = maps[output.output.map]
        events = output.output.kind is values.Kind.EVENTS
        fields = compiled.btf.layout_of(definition.value_type if events else definition.key_type)
        assert sum("cgroup_id_t" in field.typedefs for field in fields) == 1
    assert not {each.type for each in compiled.maps} & {9, 10}, "LRU maps forget without saying so"


@pytest.mark.parametrize("name", NAMES)
def test_every_probe_has_a_page_that_names_its_parameters_and_outputs(loaded: catalog.Catalog, name: str) -> None:
    page = (ROOT / "bpf" / name / "README.md").read_text()
    for word in (*probe(loaded, name).parameters, *(each.output for each in probe(loaded, name).outputs)):
        assert f"`{word.name}`" in page
    (policy,) = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.S))
    given = policy["spec"]["program"]["catalog"].get("parameters", {})
    probe(loaded, name).variables(tuple((key, str(value)) for key, value in given.items()))


def test_syscalls_become_a_bitmap_of_the_machines_numbers(loaded: catalog.Catalog) -> None:
    found = probe(loaded, "syscount")
    bitmap = found.variables([("syscalls", "openat, getppid")])["syscalls"]
    assert bits(bitmap) == {257, 110}
    arm = found.variables([("syscalls", "openat,getppid")], machine="aarch64")["syscalls"]
    assert bits(arm) == {56, 173}
    assert len(bits(found.variables([])["syscalls"])) == 512, "all of them, and what is beyond the bitmap"
    assert max(syscalls.names("x86_64")) < 511, "the last bit belongs to no system call"


def test_a_misspelt_system_call_is_answered_with_near_ones(loaded: catalog.Catalog) -> None:
    with pytest.raises(ParameterError) as error:
        probe(loaded, "syscount").variables([("syscalls", "openatt")])
    assert "openat" in error.value.write


def test_a_parameter_that_does_not_exist_is_answered_with_those_that_do(loaded: catalog.Catalog) -> None:
    with pytest.raises(ParameterError) as error:
        probe(loaded, "tcpconnlat").variables([("minimun", "1ms")])
    assert str(error.value) == "minimun: tcpconnlat has no such parameter. Did you mean minimum?"


@pytest.mark.parametrize(
    ("name", "parameter", "text", "encoded"),
    [
        ("tcpconnlat", "minimum", "1ms", (1_000_000).to_bytes(8, "little")),
        ("tcpconnlat", "minimum", "0", bytes(8)),
        ("syscount", "latency", "False", b"\0"),
        ("runqlat", "processes", "true", b"\1"),
    ],
)
def test_values_become_the_bytes_of_their_variable(
    loaded: catalog.Catalog, name: str, parameter: str, text: str, encoded: bytes
) -> None:
    assert probe(loaded, name).variables([(parameter, text)])[parameter] == encoded


@pytest.mark.parametrize(
    ("name", "parameter", "text", "why"),
    [
        ("tcpconnlat", "minimum", "5", "it is no duration"),
        ("tcpconnlat", "minimum", "2h", "it is above 1h"),
        ("syscount", "latency", "maybe", "it is neither true nor false"),
        ("runqlat", "processes", "1", "it is neither true nor false"),
    ],
)
def test_a_wrong_value_says_why(loaded: catalog.Catalog, name: str, parameter: str, text: str, why: str) -> None:
    with pytest.raises(ParameterError) as error:
        probe(loaded, name).variables([(parameter, text)])
    assert error.value.why == why
    assert error.value.write.startswith("Write ")


def test_the_frequency_goes_to_the_perf_event_and_is_bounded(loaded: catalog.Catalog) -> None:
    profile = probe(loaded, "profile")
    assert profile.variables([("frequency", "49")]) == {}
    assert [each.target for each in profile.attachments([("frequency", "49")])] == [values.PerfEvent("cpu-clock", 49)]
    assert [each.target for each in profile.attachments()] == [values.PerfEvent("cpu-clock", 99)]
    for text in ("0", "1000", "-1", "many"):
        with pytest.raises(ParameterError):
            profile.attachments([("frequency", text)])


def test_a_choice_is_its_index() -> None:
    parameter = Parameter("mode", ParameterType.CHOICE, "a", "", choices=("a", "b"), variable="mode", size_bytes=4)
    assert parameter.encode("b") == b"\1\0\0\0"
    with pytest.raises(ParameterError, match="Write one of: a, b"):
        parameter.encode("c")


def test_bounds_with_one_side_say_the_one() -> None:
    least = Parameter("n", ParameterType.INTEGER, "1", "", minimum=1, unit="Hz")
    most = Parameter("n", ParameterType.INTEGER, "1", "", maximum=9)
    with pytest.raises(ParameterError, match="Write 1 Hz or more"):
        least.number("0")
    with pytest.raises(ParameterError, match="Write 9 or less"):
        most.number("10")


def test_alternatives_are_ways_to_the_same_end_the_typed_one_first(loaded: catalog.Catalog) -> None:
    ways = [each for each in probe(loaded, "syscount").programs if each.alternative == "enter"]
    assert [each.target for each in ways] == [values.BtfTracepoint("sys_enter"), values.RawTracepoint("sys_enter")]


def test_programs_of_one_way_go_together_and_some_are_optional(loaded: catalog.Catalog) -> None:
    programs = probe(loaded, "tcptop").programs
    assert [each.way for each in programs if each.alternative == "traffic"][:4] == [
        "typed tracepoints",
        "typed tracepoints",
        "raw tracepoints",
        "raw tracepoints",
    ]
    (spliced,) = [each for each in programs if each.program == "spliced"]
    assert (spliced.target, spliced.optional) == (values.Fentry("tcp_splice_read", on_return=True), True)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (", alternative: traffic, way: functions}", ", way: functions}", "alternative is missing"),
        ("optional: true", "optional: 1", "expected true or false"),
    ],
)
def test_a_wrong_way_is_named(loaded: catalog.Catalog, old: str, new: str, says: str) -> None:
    with pytest.raises(catalog.CatalogError, match=re.escape(says)):
        changed(loaded, "tcptop", old, new)


# A folder that contradicts itself or its object


def changed(loaded: catalog.Catalog, name: str, old: str, new: str) -> catalog.Probe:
    text = (ROOT / "bpf" / name / "probe.yaml").read_text()
    assert old in text
    return catalog.parse_probe(name, text.replace(old, new), probe(loaded, name).elf)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("name: tcpconnlat", "name: other", "name differs from the folder's"),
        ("title: Making", "titel: Making", "title is missing"),
        ("default: 0ns", "default: 1ms", "is not what minimum is in the object"),
        ("default: 0ns", "default: soon", "it is no duration"),
        ("- name: minimum", "- name: maximum", "no `const volatile` variable 'maximum'"),
        ("program: set_state_raw", "program: set_state", "no program 'set_state'"),
        ("{rawTracepoint: inet_sock_set_state}", "{uprobe: x}", "is missing"),
        ("- name: attempts", "- name: tries", "no map 'tries'"),
        ("map: failures", "map: failure", "no map 'failure'"),
        ("value: slots\n", "value: slot\n", "no field 'slot'"),
        ("groupBy: [workload, key.port]", "groupBy: [workload, key.dport]", "groupBy 'key.dport' is not in"),
        ("groupBy: [workload, key.port]", "groupBy: [container, node]", "groupBy 'node' is not in"),
        ("outputs:", "more: 1\noutputs:", "unknown more"),
        ("limit: 20", "limit: x", "expected a number"),
        ("parameters:", "parameters: 1\nother:", "expected a list"),
        ("title: Making TCP connections", "title: 12", "expected text"),
        ("allowedGroupBy: [namespace,", "allowedGroupBy: [1,", "expected a list of texts"),
        ("identity:\n  of: socket", "identity:\n  of: nobody", "'nobody' is none of current, task, socket, issue"),
    ],
)
def test_a_contradiction_is_named(loaded: catalog.Catalog, old: str, new: str, says: str) -> None:
    with pytest.raises(catalog.CatalogError, match=re.escape(says)):
        changed(loaded, "tcpconnlat", old, new)


def test_no_program_and_no_map_goes_unmentioned(loaded: catalog.Catalog) -> None:
    line = next(
        each for each in (ROOT / "bpf/tcpconnlat/probe.yaml").read_text().splitlines() if "set_state_raw" in each
    )
    with pytest.raises(catalog.CatalogError, match="programs does not say where set_state_raw goes"):
        changed(loaded, "tcpconnlat", line + "\n", "")
    with pytest.raises(catalog.CatalogError, match="maps does not say what stacks holds"):
        text = (ROOT / "bpf/profile/probe.yaml").read_text()
        broken = re.sub(r"- name: stacks\n  holds:.*?\noutputs:", "outputs:", text, flags=re.S)
        catalog.parse_probe("profile", broken, probe(loaded, "profile").elf)


def test_what_is_no_object_or_no_yaml_is_named(loaded: catalog.Catalog) -> None:
    with pytest.raises(catalog.CatalogError, match=r"runqlat\.bpf\.o: "):
        catalog.parse_probe("runqlat", "name: runqlat", b"no ELF")
    with pytest.raises(catalog.CatalogError, match=r"runqlat/probe\.yaml"):
        catalog.parse_probe("runqlat", "{", probe(loaded, "runqlat").elf)
    with pytest.raises(catalog.CatalogError, match="expected a mapping"):
        catalog.parse_probe("runqlat", "[]", probe(loaded, "runqlat").elf)


def test_folders_without_objects_and_empty_ones_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalog.ENVIRONMENT, str(tmp_path))
    with pytest.raises(catalog.CatalogError, match="holds no probe; set PROBEFLEET_CATALOG"):
        catalog.load()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "probe.yaml").write_text("name: one")
    monkeypatch.setenv(catalog.OBJECTS_ENVIRONMENT, str(tmp_path))
    with pytest.raises(catalog.CatalogError, match="run `make bpf`"):
        catalog.load()


def test_the_same_source_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    """Instances are known by digest: two builds of one release must not look like two programs."""
    objects = []
    for folder in (tmp_path / "a", tmp_path / "somewhere" / "else"):
        copy = folder / "bpf"
        shutil.copytree(ROOT / "bpf" / "include", copy / "include")
        shutil.copytree(ROOT / "bpf" / "tcplife", copy / "tcplife")
        shutil.copy(ROOT / "bpf" / "Makefile", copy)
        subprocess.run(["make", "-C", str(copy), "--silent"], check=True, capture_output=True)
        objects.append((folder / "build" / "bpf" / "tcplife.bpf.o").read_bytes())
    assert objects[0] == objects[1]
    assert str(tmp_path).encode() not in objects[0]
