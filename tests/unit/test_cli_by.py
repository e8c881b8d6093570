"""``--by``: whose numbers a catalog probe tells apart, as the outputs of the policy that a user would have written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_cli import main, sources
from probefleet_cli.failures import BadInput
from probefleet_core import policy, values

CATALOG = sources.load_catalog()


def read(*words: str, by: tuple[str, ...] = ()) -> list[sources.Source]:
    return sources.read(words, catalog=CATALOG, settings={}, interval=None, by=by)


def grouped(by: str, probe: str) -> dict[str, Any]:
    spec: dict[str, Any] = read(probe, by=sources.parse_fields(by))[0].manifest["spec"]
    return spec


def test_by_takes_the_place_of_the_probes_own_pod_or_workload_and_leaves_fields_of_the_key() -> None:
    outputs = grouped("pod", "syscount")["outputs"]
    assert [(each["name"], each["groupBy"]) for each in outputs] == [
        ("calls", ["pod", "key.syscall"]),
        ("latency", ["pod", "key.syscall"]),
    ]
    assert all(each["groupBy"][:2] == ["node", "pod"] for each in grouped("node,pod", "syscount")["outputs"])


@pytest.mark.parametrize("probe", [each.name for each in CATALOG])
def test_outputs_that_by_writes_are_those_of_the_probe(probe: str) -> None:
    """But for whose they are: read back, they are the catalog's."""
    manifest = read(probe, by=("pod",))[0].manifest
    defaults = {each.output.name: each.output for each in CATALOG.probes[probe].outputs}
    for output in policy.parse_policy(manifest).outputs:
        default = defaults.pop(output.name)
        fields = tuple(field for field in default.group_by or () if field.startswith("key"))
        events = default.kind is values.Kind.EVENTS
        assert output == replace(default, group_by=output.group_by)
        assert events or output.group_by == ("pod", *fields)
    assert not defaults


def test_a_field_that_a_parameter_fills_is_filled_for_by_and_refused_without_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = grouped("pod,key.process", "runqlat")
    assert spec["program"]["catalog"]["parameters"] == {"processes": "true"}
    del spec["program"]["catalog"]["parameters"]
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump({**read("runqlat")[0].manifest, "spec": spec}))
    assert main.invoke(main.machine, ["explain", str(tmp_path / "empty.yaml")], program="probefleet") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert 'spec.outputs[0].groupBy: "key.process": the probe leaves it at 0 unless it is told to fill it' in said
    assert 'parameters: {processes: "true"}' in said


@pytest.mark.parametrize(
    ("by", "what", "words"),
    [
        (
            "key.colour",
            "runqlat",
            "no output of runqlat can be told apart by key.colour. They can be by: latency: ",
        ),
        ("pod,key.error,key.colour", "tcpconnlat", "told apart by pod and key.error and key.colour"),
        ("pod,", "runqlat", "a field is missing there"),
        ("", "runqlat", "a field is missing there"),
    ],
)
def test_a_wrong_by_is_answered_with_what_there_is(by: str, what: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        grouped(by, what)


def test_by_needs_a_catalog_probe(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"kind": "ProbePolicy", "metadata": {"name": "own"}, "spec": {"program": {}}}))
    with pytest.raises(BadInput, match="write groupBy into the outputs"):
        read(str(file), by=("pod",))
