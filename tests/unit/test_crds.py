"""The CRDs and ``policy_shape`` are one truth: the API server and `probefleet check` take the same policies."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_core import policy, policy_shape, quantities, shape

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT / "charts/probefleet/files/crds"
Schema = dict[str, Any]


def load(plural: str) -> Schema:
    crd: Schema = yaml.load((CRDS / f"{plural}.yaml").read_text(), yaml.CSafeLoader)
    return crd


def schema_of(plural: str) -> Schema:
    found: Schema = load(plural)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


EXPLAINED = sorted((ROOT / "tests/golden/explain").glob("*.txt"))
SHORT = {"ppol": "probepolicies", "prep": "probereports", "pmap": "probemaps"}


def same_pattern(ours: str, theirs: str) -> bool:
    return theirs in (f"^{ours}$", f"^({ours})$")


def differences(ours: shape.Shape, theirs: Schema, path: str) -> Iterator[str]:
    """Everything in which a shape and a schema say different things."""
    match ours:
        case shape.Record():
            if theirs.get("type") != "object":
                yield f"{path}: {theirs.get('type')} is no object"
            fields = theirs.get("properties", {})
            for name in sorted(set(ours.fields) ^ set(fields)):
                yield f"{path}.{name}: only in {'policy_shape' if name in ours.fields else 'the CRD'}"
            if sorted(ours.required) != sorted(theirs.get("required", [])):
                yield f"{path}: required is {ours.required} and {theirs.get('required')}"
            rules = [rule["rule"] for rule in theirs.get("x-kubernetes-validations", [])]
            for union in ours.unions:
                if not any(all(f"has(self.{name})" in rule for name in union.members) for rule in rules):
                    yield f"{path}: no rule for the union of {union.members}"
            if ours.rules and len(rules) <= len(ours.unions):
                yield f"{path}: a rule is missing in the CRD"
            for name in set(ours.fields) & set(fields):
                yield from differences(ours.fields[name], fields[name], f"{path}.{name}")
        case shape.ListOf():
            if theirs.get("type") != "array" or theirs.get("maxItems") != ours.max_items:
                yield f"{path}: at most {ours.max_items} items, and {theirs.get('maxItems')}"
            if (theirs.get("x-kubernetes-list-map-keys") or [""]) != [ours.unique]:
                yield f"{path}: unique by {ours.unique!r}, and {theirs.get('x-kubernetes-list-map-keys')}"
            yield from differences(ours.items, theirs["items"], f"{path}[]")
        case shape.MapOf():
            if theirs.get("maxProperties") != ours.max_items:
                yield f"{path}: at most {ours.max_items} entries, and {theirs.get('maxProperties')}"
            yield from differences(ours.values, theirs["additionalProperties"], f"{path}.*")
        case shape.Text():
            whole = bool(theirs.get("x-kubernetes-int-or-string"))
            if ours.or_whole != whole or not (whole or theirs.get("type") == "string"):
                yield f"{path}: text, and {theirs.get('type')}"
            if theirs.get("maxLength") != ours.max_length:
                yield f"{path}: at most {ours.max_length} characters, and {theirs.get('maxLength')}"
            if ours.min_length and theirs.get("minLength") != ours.min_length:
                yield f"{path}: at least {ours.min_length} characters, and {theirs.get('minLength')}"
            if sorted(ours.choices) != sorted(theirs.get("enum", [])):
                yield f"{path}: {ours.choices} and {theirs.get('enum')}"
            if bool(ours.pattern) != ("pattern" in theirs) or (
                ours.pattern and not same_pattern(ours.pattern, theirs["pattern"])
            ):
                yield f"{path}: {ours.pattern} and {theirs.get('pattern')}"
        case shape.Whole():
            if (theirs.get("minimum"), theirs.get("maximum")) != (ours.minimum, ours.maximum):
                yield f"{path}: {ours.minimum}…{ours.maximum}, and {theirs.get('minimum')}…{theirs.get('maximum')}"
        case shape.Anything():
            if theirs.get("x-kubernetes-preserve-unknown-fields") is not True or "type" in theirs:
                yield f"{path}: anything, and {theirs.get('type')}"
        case shape.Flag():
            if theirs.get("type") != "boolean":
                yield f"{path}: true or false, and {theirs.get('type')}"


@pytest.mark.parametrize(
    ("plural", "ours"), [("probepolicies", policy_shape.SPEC), ("probemaps", policy_shape.MAP_SPEC)]
)
def test_the_crd_says_what_policy_says(plural: str, ours: shape.Record) -> None:
    assert list(differences(ours, schema_of(plural)["properties"]["spec"], "spec")) == []


def test_the_comparison_sees_differences() -> None:
    changed = schema_of("probepolicies")["properties"]["spec"]
    changed["properties"]["interval"]["maxLength"] = 31
    changed["properties"]["outputs"]["maxItems"] = 17
    del changed["properties"]["suspend"]
    changed["properties"]["program"]["x-kubernetes-validations"].clear()
    changed["properties"]["outputs"]["items"]["properties"]["from"]["properties"]["map"]["pattern"] = "^.*$"
    found = "\n".join(differences(policy_shape.SPEC, changed, "spec"))
    for path in ("spec.interval", "spec.outputs:", "spec.suspend", "spec.program:", "spec.outputs[].from.map"):
        assert path in found


def test_defaults_are_the_same() -> None:
    spec = schema_of("probepolicies")["properties"]["spec"]["properties"]
    parsed = policy.parse_policy(
        {
            "apiVersion": policy.API_VERSION,
            "kind": "ProbePolicy",
            "metadata": {"name": "x"},
            "spec": {
                "program": {"catalog": {"name": "x"}},
                "outputs": [{"name": "a", "from": {"map": "m"}, "topk": {}}],
            },
        }
    )
    assert spec["scope"]["default"] == parsed.scope
    assert quantities.duration_ns(spec["interval"]["default"]) == parsed.interval_ms * 1_000_000
    assert spec["suspend"]["default"] == parsed.suspend
    assert spec["outputs"]["items"]["properties"]["limit"]["default"] == parsed.outputs[0].limit
    budget = spec["budget"]["properties"]
    assert quantities.cpu_millicores(budget["cpu"]["default"]) == parsed.budget.cpu_millicores
    assert quantities.memory_bytes(budget["mapMemory"]["default"]) == parsed.budget.map_memory_bytes


def walk(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from walk(inner, f"{path}.{name}")
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            yield from walk(schema[word], f"{path}[]")


@pytest.mark.parametrize("plural", ["probepolicies", "probereports", "probemaps"])
def test_every_field_is_described_and_bounded(plural: str) -> None:
    root = schema_of(plural)
    for part in ("spec", "status"):
        for path, schema in walk(root["properties"].get(part, {"type": "object", "description": "-"}), part):
            assert schema.get("description"), f"{path} has no description"
            kind = schema.get("type")
            if kind == "string":
                bounded = {"maxLength", "enum", "format"} & schema.keys()
                assert bounded, f"{path} is a string without a bound"
            if kind == "array":
                assert "maxItems" in schema, f"{path} is a list without a bound"
                assert "x-kubernetes-list-type" in schema or "[]" in path or "maxItems" in schema
            if "additionalProperties" in schema:
                assert "maxProperties" in schema, f"{path} is a map without a bound"
            for rule in schema.get("x-kubernetes-validations", []):
                assert rule.get("message") or rule.get("messageExpression"), f"{path} has a rule without words"


@pytest.mark.parametrize(
    ("plural", "short", "columns"),
    [
        ("probepolicies", "ppol", ["Program", "Nodes", "Rate", "Overhead", "Status", "Age"]),
        ("probereports", "prep", ["Coverage", "Rate", "Lost", "P50", "P99", "Top", "Since"]),
        ("probemaps", "pmap", ["Type", "Entries", "Users", "Nodes", "Status", "Age"]),
    ],
)
def test_names_and_columns(plural: str, short: str, columns: list[str]) -> None:
    spec = load(plural)["spec"]
    version = spec["versions"][0]
    assert spec["names"]["shortNames"] == [short]
    assert spec["names"]["categories"] == ["probefleet"]
    assert version["subresources"] == {"status": {}}
    shown = version["additionalPrinterColumns"]
    assert [column["name"] for column in shown if not column.get("priority")] == columns
    assert [column for column in shown if column.get("priority") == 1], "-o wide shows more"


@pytest.mark.parametrize("plural", ["probepolicies", "probemaps"])
def test_conditions_can_be_waited_for(plural: str) -> None:
    conditions = schema_of(plural)["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


def test_the_keep_switch_finds_its_mark() -> None:
    """The template replaces these words; without them `helm uninstall` would delete every policy."""
    for path in CRDS.glob("*.yaml"):
        assert path.read_text().count("annotations: {}") == 1


@pytest.mark.parametrize("path", EXPLAINED, ids=lambda path: path.stem)
def test_what_kubectl_is_to_explain_is_what_the_kinds_say(path: Path) -> None:
    """The golden texts are held against a real kubectl where there is a cluster; here against the descriptions, which
    kubectl breaks at 76 characters.
    """
    kind, *fields = path.stem.split(".")
    schema = schema_of(SHORT[kind])
    for field in fields:
        schema = schema["properties"][field]
        schema = schema.get("items", schema)
    lines = path.read_text().splitlines()
    first = lines.index("FIELDS:") + 1
    wanted: list[str] = []
    for name, field in sorted(schema["properties"].items()):
        wanted += [name, *textwrap.wrap(field["description"], 76, break_long_words=False, break_on_hyphens=False)]
    said = [re.sub(r"\t<.*", "", line).strip() for line in lines[first:]]
    assert [line for line in said if line and not line.startswith("enum: ")] == wanted
