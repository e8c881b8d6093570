"""From a manifest to a value, or to every problem at once."""

from __future__ import annotations

import base64
import copy
import datetime
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from probefleet_core import c_declaration, errors, policy, policy_shape, quantities, shape, to_wire, values
from probefleet_wire import map_types

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
MESSAGES = ROOT / "tests/golden/messages"
Json = dict[str, Any]


def manifest(spec: Json | None = None, **metadata: Any) -> Json:
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": "slow", "namespace": "shop", **metadata},
        "spec": {"program": {"catalog": {"name": "runqlat"}}} if spec is None else spec,
    }


def catalog(**spec: Any) -> Json:
    return manifest({"program": {"catalog": {"name": "runqlat"}}, **spec})


def cluster(program: Json, **spec: Any) -> Json:
    return manifest({"scope": "Cluster", "program": program, **spec})


def problems(document: Json) -> list[errors.Problem]:
    with pytest.raises(errors.Refused) as caught:
        (policy.parse_probe_map if document.get("kind") == "ProbeMap" else policy.parse_policy)(document)
    return list(caught.value.problems)


def test_the_smallest_policy_has_the_defaults() -> None:
    parsed = policy.parse_policy(manifest())
    assert parsed == values.ProbePolicy(
        uid=values.PolicyUid("local-shop-slow"),
        namespace="shop",
        name="slow",
        generation=1,
        created_ns=0,
        deleting=False,
        scope=values.Scope.NAMESPACE,
        program=values.CatalogProgram("runqlat"),
    )
    assert parsed.budget == policy.DEFAULT_BUDGET


def test_everything_is_read() -> None:
    parsed = policy.parse_policy(
        {
            **cluster(
                {"c": {"source": "int x;"}},
                nodes={"selector": {"matchLabels": {"pool": "web", "arch": "arm64"}}},
                pods={
                    "selector": {
                        "matchExpressions": [
                            {"key": "app", "operator": "In", "values": ["a", "b"]},
                            {"key": "x", "operator": "Exists"},
                        ]
                    }
                },
                attach=[
                    {"program": "a", "tracepoint": {"category": "sched", "name": "sched_switch"}},
                    {"program": "a", "rawTracepoint": {"name": "sched_switch"}},
                    {"program": "a", "tpBtf": {"name": "sched_switch"}},
                    {"program": "a", "kprobe": {"function": "f", "offset": 4}},
                    {"program": "a", "kretprobe": {"function": "f"}},
                    {"program": "a", "uprobe": {"path": "/bin/x", "symbol": "main", "pid": 3}},
                    {"program": "a", "uretprobe": {"path": "/bin/x", "offset": 16}},
                    {"program": "a", "perfEvent": {"event": "cpu-clock", "frequency": 99}},
                    {"program": "a", "perfEvent": {"event": "page-faults", "period": 100}},
                    {"program": "a", "syscall": {"name": "execve", "return": True}},
                    {"program": "a", "kretprobe": {"functions": "tcp_*"}},
                    {"program": "a", "fentry": {"function": "f"}},
                    {"program": "a", "fexit": {"function": "f"}},
                    {"program": "a", "lsm": {"hook": "file_open"}},
                    {"program": "a", "uprobe": {"library": "libc", "symbol": "malloc"}},
                    {"program": "a", "usdt": {"path": "/bin/x", "provider": "p", "name": "n", "pid": 3}},
                    {"program": "a", "usdt": {"library": "c", "provider": "p", "name": "n", "pods": True}},
                ],
                maps=[{"name": "m", "share": {"probeMap": "p"}}, {"name": "n", "maxEntries": 7}],
                outputs=[
                    {
                        "name": "h",
                        "from": {"map": "m", "value": "slots"},
                        "histogram": {"scale": "linear", "step": 10, "unit": "ns", "slots": "key.slot"},
                        "groupBy": ["pod", "pod", "key.port"],
                        "limit": 5,
                        "decode": {"key.uid": "uid"},
                    },
                    {"name": "g", "from": {"map": "m"}, "gauge": {"merge": "max"}, "unit": "bytes"},
                    {"name": "e", "from": {"map": "r", "record": "struct event"}, "events": {}},
                    {"name": "l", "from": {"map": "m"}, "histogram": {}},
                ],
                interval="1m30s",
                ttl="2h",
                suspend=True,
                budget={"cpu": "0.5", "mapMemory": 65536},
            ),
            "status": {"anything": 1},
        }
    )
    assert parsed.nodes.match_labels == (("arch", "arm64"), ("pool", "web"))
    assert parsed.pods is not None and parsed.pods.match_expressions[0].values == ("a", "b")
    assert [type(each.target).__name__ for each in parsed.attach] == [
        *("Tracepoint", "RawTracepoint", "BtfTracepoint", "Kprobe", "Kprobe"),
        *("Uprobe", "Uprobe", "PerfEvent", "PerfEvent", "Syscall"),
        *("KprobePattern", "Fentry", "Fentry", "Lsm", "Uprobe", "Usdt", "Usdt"),
    ]
    assert parsed.attach[4].target == values.Kprobe("f", on_return=True)
    assert parsed.attach[6].target == values.Uprobe("/bin/x", offset=16, on_return=True)
    assert parsed.attach[10].target == values.KprobePattern("tcp_*", on_return=True)
    assert [each.target for each in parsed.attach[12:16]] == [
        values.Fentry("f", on_return=True),
        values.Lsm("file_open"),
        values.Uprobe("libc", "malloc"),
        values.Usdt("/bin/x", "p", "n", 3),
    ]
    assert to_wire.describe(parsed.attach[16].target) == "usdt c:p:n in pods"
    assert parsed.maps == (values.MapUse("m", probe_map="p"), values.MapUse("n", max_entries=7))
    first = parsed.outputs[0]
    assert first.group_by == ("pod", "key.port") and first.unit == "ns" and first.limit == 5
    assert first.histogram == values.Histogram(values.Scale.LINEAR, 10, "key.slot")
    assert parsed.outputs[1].merge is values.Merge.MAX and parsed.outputs[1].group_by is None
    assert parsed.outputs[2].record == "event"
    assert parsed.outputs[3].histogram == values.Histogram()
    assert (parsed.interval_ms, parsed.ttl_ms, parsed.suspend) == (90_000, 7_200_000, True)
    assert parsed.budget == values.Budget(500, 65536)


def test_what_the_api_server_adds_is_read() -> None:
    when = "2026-01-02T03:04:05Z"
    parsed = policy.parse_policy(manifest(uid="u-1", generation=7, creationTimestamp=when, deletionTimestamp=when))
    assert (parsed.uid, parsed.generation, parsed.deleting) == ("u-1", 7, True)
    assert parsed.created_ns == 1767323045 * 10**9
    by_yaml = policy.parse_policy(manifest(creationTimestamp=datetime.datetime(2026, 1, 2, 3, 4, 5)))
    assert by_yaml.created_ns == parsed.created_ns


def test_parameters_may_be_numbers_but_not_booleans() -> None:
    parsed = policy.parse_policy(manifest({"program": {"catalog": {"name": "x", "parameters": {"b": 3, "a": "1ms"}}}}))
    assert parsed.program == values.CatalogProgram("x", (("a", "1ms"), ("b", "3")))
    found = problems(manifest({"program": {"catalog": {"name": "x", "parameters": {"a": True}}}}))
    assert found[0].write == 'Write it in quotes: "true".'


def test_bcc_histograms_count_as_bcc_does() -> None:
    outputs = [{"name": "a", "from": {"map": "m"}, "histogram": {}}]
    by_kind = {
        kind: policy.parse_policy(cluster({kind: {"source": "x"}}, outputs=outputs)).outputs[0].histogram
        for kind in ("bcc", "c")
    }
    assert by_kind["bcc"] == values.Histogram(values.Scale.LOG2_BCC)
    assert by_kind["c"] == values.Histogram(values.Scale.LOG2)


def test_objects_are_inline_or_in_a_config_map() -> None:
    inline = policy.parse_policy(
        cluster({"object": {"sha256": "a" * 64, "inline": base64.b64encode(b"\x7fELF").decode()}})
    )
    assert inline.program == values.ObjectProgram("a" * 64, inline=b"\x7fELF")
    placed = policy.parse_policy(
        cluster({"object": {"sha256": "b" * 64, "configMapKeyRef": {"name": "c", "key": "k.o"}}})
    )
    assert placed.program == values.ObjectProgram("b" * 64, config_map=values.ConfigMapKey("c", "k.o"))


def test_null_counts_as_absent() -> None:
    assert policy.parse_policy(catalog(pods=None, outputs=None, ttl=None)).pods is None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if "probefleet.io" not in document["apiVersion"]:
            continue  # the pods that are measured
        if document["kind"] == "ProbeMap":
            policy.parse_probe_map(document)
        else:
            policy.parse_policy(document)


@pytest.mark.parametrize("path", sorted(MESSAGES.glob("*.yaml")), ids=lambda path: path.stem)
def test_messages_are_the_golden_ones(path: Path) -> None:
    """``PROBEFLEET_GOLDEN=write`` writes them anew; read the difference before committing it."""
    document = yaml.safe_load(path.read_text())
    text = "".join(f"{problem}\n" for problem in problems(document))
    golden = path.with_suffix(".txt")
    if os.environ.get("PROBEFLEET_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize(
    ("change", "path", "what"),
    [
        ({"interval": "10"}, "spec.interval", '"10"'),
        ({"interval": "500ms"}, "spec.interval", '"500ms"'),
        ({"interval": 10}, "spec.interval", "this is a whole number"),
        ({"ttl": "1d"}, "spec.ttl", '"1d"'),
        ({"ttl": "10s\n"}, "spec.ttl", '"10s"'),
        ({"suspend": "no"}, "spec.suspend", "this is text"),
        ({"budget": {"cpu": "0"}}, "spec.budget.cpu", '"0"'),
        ({"budget": {"cpu": 1.5}}, "spec.budget.cpu", "this is a number"),
        ({"budget": {"mapMemory": "8mb"}}, "spec.budget.mapMemory", '"8mb"'),
        ({"scope": "cluster"}, "spec.scope", '"cluster" is not known here'),
        ({"nodes": []}, "spec.nodes", "this is a list"),
        ({"nodes": {}}, "spec.nodes.selector", "missing"),
        ({"outputs": {}}, "spec.outputs", "this is an object"),
        ({"outputs": [{}] * 17}, "spec.outputs", "17 items"),
        ({"pods": {"selector": {"matchLabels": [1]}}}, "spec.pods.selector.matchLabels", "this is a list"),
        ({"pods": {"selector": {"matchLabels": {"a b": "c"}}}}, "spec.pods.selector.matchLabels", '"a b"'),
        (
            {"pods": {"selector": {"matchLabels": {f"k{n}": "c" for n in range(33)}}}},
            "spec.pods.selector.matchLabels",
            "33 entries",
        ),
        (
            {"pods": {"selector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}},
            "spec.pods.selector.matchExpressions[0].values",
            "missing",
        ),
        (
            {"pods": {"selector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}}},
            "spec.pods.selector.matchExpressions[0].values",
            "values with Exists",
        ),
        ({"attach": [{"program": "a", "kprobe": {"function": "f"}}]}, "spec.attach", "attach with program.catalog"),
        ({"maps": [{"name": "a"}]}, "spec.maps[0]", "nothing is said of the map"),
        (
            {"maps": [{"name": "a", "maxEntries": 1, "share": {"probeMap": "p"}}]},
            "spec.maps[0].maxEntries",
            "share and maxEntries at once",
        ),
        ({"maps": [{"name": "a", "maxEntries": 0}]}, "spec.maps[0].maxEntries", "0"),
        (
            {"maps": [{"name": "a", "maxEntries": 1}, {"name": "a", "maxEntries": 2}]},
            "spec.maps[1].name",
            '"a" is there twice',
        ),
        ({"maps": [3]}, "spec.maps[0]", "this is a whole number"),
        ({"program": None}, "spec.program", "missing"),
        ({"program": {}}, "spec.program", "no program"),
        ({"rollout": {}}, "spec.rollout", "unknown field"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(change: Json, path: str, what: str) -> None:
    found = problems(catalog(**change))
    assert (path, what) in [(each.path, each.what) for each in found]
    assert all(each.why and each.write for each in found)


@pytest.mark.parametrize(
    ("output", "path"),
    [
        ({"counter": {}, "unit": "a b"}, "unit"),
        ({"histogram": {"unit": "ns"}, "unit": "ns"}, "unit"),
        ({"histogram": {"scale": "linear"}}, "histogram.step"),
        ({"histogram": {"step": 3}}, "histogram.step"),
        ({"events": {}, "groupBy": ["pod"]}, "groupBy"),
        ({"events": {}, "from": {"map": "m", "value": "v"}}, "from.value"),
        ({"counter": {}, "from": {"map": "m", "record": "struct e"}}, "from.record"),
        ({"counter": {}, "limit": 51}, "limit"),
        ({"counter": {}, "groupBy": ["pods"]}, "groupBy[0]"),
        ({"counter": {}, "decode": {"key": "user"}}, "decode.key"),
    ],
)
def test_outputs_are_checked(output: Json, path: str) -> None:
    found = problems(catalog(outputs=[{"name": "o", "from": {"map": "m"}, **output}]))
    assert [each.path for each in found] == [f"spec.outputs[0].{path}"]


@pytest.mark.parametrize(
    ("attachment", "path"),
    [
        ({"uprobe": {"path": "/bin/sh"}}, "uprobe"),
        ({"uprobe": {"path": "sh", "symbol": "a"}}, "uprobe.path"),
        ({"perfEvent": {"event": "cpu-clock"}}, "perfEvent"),
        ({"perfEvent": {"event": "cpu-clock", "frequency": 1, "period": 1}}, "perfEvent"),
        ({"syscall": {"name": "SYS_read"}}, "syscall.name"),
        ({"kprobe": {}}, "kprobe"),
        ({"kprobe": {"function": "tcp_*"}}, "kprobe.function"),
        ({"kprobe": {"functions": "***"}}, "kprobe.functions"),
        ({"kprobe": {"functions": "tcp_*", "offset": 4}}, "kprobe.offset"),
        ({"kretprobe": {"function": "f", "functions": "ff*"}}, "kretprobe"),
        ({"fentry": {"function": "tcp_*"}}, "fentry.function"),
        ({"lsm": {"hook": "lsm/file_open"}}, "lsm.hook"),
        ({"uprobe": {"library": "../x", "symbol": "a"}}, "uprobe.library"),
        ({"usdt": {"provider": "p", "name": "n"}}, "usdt"),
        ({"uprobe": {"path": "/bin/x", "symbol": "f", "pods": True, "pid": 3}}, "uprobe.pid"),
        ({"usdt": {"path": "/bin/x", "provider": "p", "name": "n", "pods": True, "pid": 3}}, "usdt.pid"),
        ({"usdt": {"path": "/bin/x", "provider": "p:q", "name": "n"}}, "usdt.provider"),
    ],
)
def test_attachments_are_checked(attachment: Json, path: str) -> None:
    found = problems(cluster({"bcc": {"source": "x"}}, attach=[{"program": "a", **attachment}]))
    assert [each.path for each in found] == [f"spec.attach[0].{path}"]


def test_own_programs_need_cluster_scope() -> None:
    assert problems(manifest({"program": {"bcc": {"source": "x"}}}))[0].path == "spec.scope"


def test_sources_are_bounded_in_characters() -> None:
    policy.parse_policy(cluster({"c": {"source": "x" * 98304}}))
    assert problems(cluster({"c": {"source": "x" * 98305}}))[0].what == "98,305 characters"


def test_inline_objects_are_base64() -> None:
    assert "base64" in problems(cluster({"object": {"sha256": "a" * 64, "inline": "abcde"}}))[0].why


def test_other_kinds_are_refused() -> None:
    found = problems({"kind": "ProbePolcy", "apiVersion": "v1", "metdata": {}, "spec": 3})
    assert [each.path for each in found] == ["apiVersion", "kind", "metadata.name", "metdata", "spec"]
    assert "spec" in {each.path for each in problems({"kind": "ProbeMap"})}


def probe_map(**spec: Any) -> Json:
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbeMap",
        "metadata": {"name": "m", "uid": "u"},
        "spec": {"type": "hash", "maxEntries": 8, "key": "u32 pid", "value": "u64 n", **spec},
    }


def test_probe_maps_are_read() -> None:
    parsed = policy.parse_probe_map(probe_map(policies=["a"]), namespace="shop")
    assert parsed == values.ProbeMap(
        uid=values.ProbeMapUid("u"),
        namespace="shop",
        name="m",
        generation=1,
        deleting=False,
        type=values.MapType.HASH,
        max_entries=8,
        key="u32 pid",
        value="u64 n",
        policies=("a",),
    )


INNER = {"type": "array", "maxEntries": 4, "value": "u64 n"}


@pytest.mark.parametrize("kind", policy_shape.NOT_SHARED)
def test_what_no_two_programs_can_share_is_refused_with_the_kernels_reason(kind: str) -> None:
    (found,) = problems(probe_map(type=kind))
    assert (found.path, found.why, found.write) == ("spec.type", *policy_shape.NOT_SHARED[kind])
    assert kind in {map_types.name_of(number) for number in map_types.MapType}, "as the kernel calls it"
    crd = " ".join((ROOT / "charts/probefleet/files/crds/probemaps.yaml").read_text().split())
    assert f"{found.why}. {found.write}" in crd, "the API server says the same"


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"key": None}, "spec.key"),
        ({"type": "array"}, "spec.key"),
        ({"type": "array", "key": None, "value": None}, "spec.value"),
        ({"type": "stack-trace", "key": None}, "spec.value"),
        ({"type": "ringbuf", "key": None, "value": None}, "spec.maxEntries"),
        ({"type": "ringbuf", "key": None, "value": None, "maxEntries": 5000}, "spec.maxEntries"),
        ({"type": "prog-array", "value": None}, "spec.key"),
        ({"type": "prog-array", "key": None, "value": None, "maxEntries": 65_537}, "spec.maxEntries"),
        ({"type": "cpu-set"}, "spec.type"),
        ({"type": "array-of-maps", "key": None, "value": None, "maxEntries": 4097, "inner": INNER}, "spec.maxEntries"),
        ({"type": "hash", "maxEntries": None}, "spec.maxEntries"),
        ({"type": "hash", "inner": INNER}, "spec.inner"),
        ({"type": "task-storage", "key": None}, "spec.maxEntries"),
        ({"type": "task-storage", "maxEntries": None}, "spec.key"),
        ({"type": "cgroup-storage"}, "spec.maxEntries"),
        ({"type": "array-of-maps", "key": None, "value": None}, "spec.inner"),
        ({"type": "array-of-maps", "key": None, "inner": INNER}, "spec.value"),
        ({"type": "array-of-maps", "key": None, "value": None, "inner": {**INNER, "keys": [1]}}, "spec.inner.keys"),
        ({"type": "array-of-maps", "key": None, "value": None, "inner": {**INNER, "key": "u32 k"}}, "spec.inner.key"),
        ({"type": "array-of-maps", "key": None, "value": None, "inner": {**INNER, "type": "queue"}}, "spec.inner.type"),
        ({"type": "hash-of-maps", "value": None, "inner": INNER}, "spec.inner.keys"),
        ({"type": "hash-of-maps", "value": None, "inner": {**INNER, "keys": [*range(9)]}}, "spec.inner.keys"),
        ({"type": "hash-of-maps", "key": None, "value": None, "inner": {**INNER, "keys": [1]}}, "spec.key"),
        ({"key": "u32 pid; u32 uid"}, "spec.key"),
        ({"key": '#include "/etc/shadow"'}, "spec.key"),
    ],
)
def test_probe_maps_are_checked(change: Json, path: str) -> None:
    assert [each.path for each in problems(probe_map(**change))] == [path]


@pytest.mark.parametrize(
    ("text", "typedef"),
    [
        ("u32", "typedef u32 x;"),
        ("u32 pid;", "typedef u32 x;"),
        ("const unsigned long long n", "typedef const unsigned long long x;"),
        ("u64 slots[0x10][2]", "typedef u64 x[0x10][2];"),
        ("enum state s", "typedef enum state x;"),
        ("struct sock", "typedef struct sock x;"),
        (
            "struct k { u32 a, b[2]; u8 c : 3; union { u64 d; }; }",
            "typedef struct k { u32 a, b[2]; u8 c : 3; union { u64 d; }; } x;",
        ),
    ],
)
def test_declarations_are_read(text: str, typedef: str) -> None:
    assert c_declaration.parse(text).typedef("x") == typedef


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a name is missing at the end"),
        ("u32 *p", "a pointer means nothing"),
        ("u32 a, b", "goes on"),
        ("struct { }", "no members"),
        ("struct { u32 a }", "“;” is missing before “}”"),
        ("struct { u32 a;", "a name is missing at the end"),
        ("u32 a[", "a number is missing at the end"),
        ("u32 a[n]", "a number is missing before “n”"),
        ("u32 a[3", "“]” is missing at the end"),
        ("[3]", "a name is missing before “[”"),
        ("asm goto", "“asm” has no place"),
        ("u32 x = 3", "“=” has no place"),
        ("u32 f(void)", "“(” has no place"),
        ("struct { " * 10, "deep"),
        ("a " * 2001, "words"),
    ],
)
def test_nothing_but_declarations(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)^.*$") as caught:
        c_declaration.parse(text)
    assert why in str(caught.value)


@given(st.text(max_size=60))
def test_no_text_breaks_the_declaration_reader(text: str) -> None:
    try:
        made = c_declaration.parse(text)
    except ValueError:
        return
    assert not set(made.typedef("x")) & set("#\"'()\\")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["program", "catalog", "name", "outputs", "from", "map", "counter", "scope", "maps", "bcc", "x"]
                ),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_no_spec_breaks_the_parser(spec: Any) -> None:
    document = {**manifest(), "spec": spec}
    before = copy.deepcopy(document)
    try:
        policy.parse_policy(document)
    except errors.PolicyRefused as refused:
        assert refused.problems
    assert document == before


@pytest.mark.parametrize(
    ("text", "ns"), [("5ns", 5), ("3us", 3000), ("3µs", 3000), ("1ms", 10**6), ("1h1m1s", 3661 * 10**9)]
)
def test_durations(text: str, ns: int) -> None:
    assert quantities.duration_ns(text) == ns


@pytest.mark.parametrize("text", ["", "10", "1.5s", "-1s", "1 s", "s", "1d"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(ValueError, match="a duration is"):
        quantities.duration_ns(text)


def test_cpu_and_memory() -> None:
    assert [quantities.cpu_millicores(text) for text in ("10m", "2", "0.5")] == [10, 2000, 500]
    assert [quantities.memory_bytes(text) for text in ("7", "1k", "8Mi")] == [7, 1000, 8 << 20]
    for wrong in ("", "1e3", "-1", "1 m"):
        with pytest.raises(ValueError, match="a CPU quantity"):
            quantities.cpu_millicores(wrong)
        with pytest.raises(ValueError, match="a memory quantity"):
            quantities.memory_bytes(wrong)
    shown = [quantities.show_bytes(size) for size in (7, 1536, 200 << 20, 5000 << 30)]
    assert shown == ["7 B", "1.5 KiB", "200 MiB", "5000 GiB"]


def test_selectors_mean_what_kubernetes_means() -> None:
    def one(operator: str, *wanted: str) -> values.Selector:
        return values.Selector(match_expressions=(values.Requirement("a", values.Operator(operator), wanted),))

    assert values.Selector().matches({})
    assert values.Selector((("a", "b"),)).matches({"a": "b", "c": "d"})
    assert not values.Selector((("a", "b"),)).matches({"a": "c"})
    assert one("In", "x").matches({"a": "x"}) and not one("In", "x").matches({})
    assert one("NotIn", "x").matches({}) and not one("NotIn", "x").matches({"a": "x"})
    assert one("Exists").matches({"a": ""}) and not one("Exists").matches({})
    assert one("DoesNotExist").matches({}) and not one("DoesNotExist").matches({"a": ""})


def test_near_matches() -> None:
    assert errors.near("RunQLat", ["runqlat", "syscount"]) == ["runqlat"]
    assert errors.did_you_mean("zzz", [], what="probe") == "There is no probe."
    assert "p6 and 3 more" in errors.did_you_mean("zzz", [f"p{n}" for n in range(19)], what="probe")


def test_long_values_are_cut_and_types_have_names() -> None:
    assert shape.shown("a" * 50) == "a" * 39 + "…"
    assert shape.type_name(None) == "nothing"
    assert shape.type_name(datetime.date(2026, 1, 1)) == "date"
    assert shape.join("", "spec") == "spec"
