"""What the documents say is so: links lead somewhere, policies are accepted, commands and targets exist.

Reads all Markdown of the repository and the examples; runs nothing of it.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import click
import pytest
import yaml
from probefleet_agent import errors as agent_errors
from probefleet_cli import main as command_line
from probefleet_core import catalog, errors, planner, policy, values
from probefleet_wire.v1 import plan_pb2

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "bpf/**/*.md", "tests/**/*.md", "charts/**/*.md")
    for path in ROOT.glob(pattern)
)
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
OURS = ("ProbePolicy", "ProbeMap")


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def manifests() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every ProbePolicy and ProbeMap in documents and examples, with where it is."""
    texts = [
        (name_of(path), block)
        for path in DOCUMENTS
        for kind, block in FENCE.findall(path.read_text())
        if kind == "yaml"
    ]
    texts += [(name_of(path), path.read_text()) for path in EXAMPLES]
    for where, text in texts:
        for document in yaml.load_all(text, yaml.CSafeLoader):
            if isinstance(document, dict) and document.get("kind") in OURS:
                yield f"{where}:{document['metadata']['name']}", document


MANIFESTS = list(manifests())
POLICIES = [(where, each) for where, each in MANIFESTS if each["kind"] == "ProbePolicy"]


def commands(text: str) -> list[str]:
    """Lines of code: indented or fenced, and what stands between backquotes."""
    fenced = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    rest = FENCE.sub("", text)
    # A command between backquotes may be broken over two lines.
    inline = INLINE.findall(re.sub(r"\n(?=\S)", " ", rest))
    return fenced + [line for line in rest.splitlines() if line.startswith("    ")] + inline


def test_there_are_documents_and_policies_to_look_at() -> None:
    assert {"README.md", "docs/write-a-policy.md", "docs/read-a-report.md"} <= {name_of(path) for path in DOCUMENTS}
    assert len(POLICIES) >= 12


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_relative_link_leads_to_a_file(path: pathlib.Path) -> None:
    targets = [link for link in LINK.findall(path.read_text()) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in targets if not (path.parent / link.split("#")[0]).exists()]
    assert missing == []


@pytest.mark.parametrize(("where", "manifest"), MANIFESTS, ids=[where for where, _ in MANIFESTS])
def test_every_policy_and_map_is_accepted(where: str, manifest: Mapping[str, Any]) -> None:
    parse = policy.parse_policy if manifest["kind"] == "ProbePolicy" else policy.parse_probe_map
    parsed = parse(manifest)
    assert parsed.name == manifest["metadata"]["name"], where


def test_a_wrong_policy_would_not_be_accepted() -> None:
    wrong = {**POLICIES[0][1], "spec": {**POLICIES[0][1]["spec"], "intervall": "1s"}}
    with pytest.raises(errors.Refused, match="intervall"):
        policy.parse_policy(wrong)


CATALOG_POLICIES = [(where, each) for where, each in POLICIES if "catalog" in each["spec"]["program"]]


@pytest.mark.parametrize(("where", "manifest"), CATALOG_POLICIES, ids=[where for where, _ in CATALOG_POLICIES])
def test_every_policy_of_a_catalog_probe_can_be_planned(where: str, manifest: Mapping[str, Any]) -> None:
    known = catalog.load()
    found = planner.plan(policy.parse_policy(manifest), catalog=known, elf=None, probe_maps={}, node_count=3, cpus=2)
    named = [output["name"] for output in manifest["spec"].get("outputs", [])]
    planned = [output.name for output in found.plan.outputs]
    assert planned == (named or planned), where
    assert found.plan.scope == (
        plan_pb2.SCOPE_CLUSTER if manifest["spec"].get("scope") == "Cluster" else plan_pb2.SCOPE_NAMESPACE
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_make_target_that_is_named_exists(path: pathlib.Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*(?: [a-z][a-z0-9-]*)*):(?!=)", (ROOT / "Makefile").read_text(), re.M))
    known = {word for line in targets for word in line.split()}
    named = {
        match.group(1)
        for line in commands(path.read_text())
        if (match := re.match(r"\s*(?:sudo )?(?:[A-Z_]+=\S+ )?make ([a-z][a-z0-9-]*)", line))
    }
    assert named <= known


def subcommands(group: click.Group) -> set[str]:
    return set(group.commands)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_of_ours_that_is_named_exists(path: pathlib.Path) -> None:
    machine = command_line.command_for("probefleet")
    fleet = command_line.command_for("kubectl-probefleet")
    for line in commands(path.read_text()):
        if match := re.match(r"[\s$]*(?:\.venv/bin/)?probefleet ([a-z]+)\b(.*)", line):
            check_options(machine, match, line)
        elif match := re.match(r"[\s$]*kubectl probefleet ([a-z]+)\b(.*)", line):
            check_options(fleet, match, line)


def check_options(group: click.Group, match: re.Match[str], line: str) -> None:
    assert match.group(1) in subcommands(group), line
    known = {option for each in group.commands[match.group(1)].params for option in each.opts}
    options = set(re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", match.group(2)))
    assert options <= known | {"-h", "--help"}, line


@pytest.mark.parametrize("name", ["demo", "cluster-demo"])
def test_the_demos_can_be_executed_and_name_files_that_exist(name: str) -> None:
    script = ROOT / "examples" / name
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    files = re.findall(r"(?:examples|tests|charts)/[A-Za-z0-9_./-]+", script.read_text())
    assert files
    assert [path for path in files if not (ROOT / path).exists()] == []


def test_the_catalog_document_lists_every_probe_with_its_outputs() -> None:
    rows = dict(
        re.findall(
            r"^\| \[(\w+)\]\(\.\./bpf/\w+[^)]*\) \|[^|]*\| ([^|]*) \|$", (ROOT / "docs/catalog.md").read_text(), re.M
        )
    )
    known = catalog.load()
    assert set(rows) == set(known.names)
    for probe in known:
        assert rows[probe.name] == ", ".join(output.output.name for output in probe.outputs)


@pytest.mark.parametrize("name", ["Debian 11", "Ubuntu 22.04", "Fedora", "CentOS 8.5", "Anolis 8.8", "Kylin V10"])
def test_every_distribution_has_its_kernel_its_types_and_a_verdict(name: str) -> None:
    text = (ROOT / "docs/distributions.md").read_text()
    rows = [
        [cell.strip() for cell in row.strip("| ").split(" | ")] for row in text.splitlines() if row.startswith("| ")
    ]
    ((_, kernel, types, verdict),) = [row for row in rows if row[0].startswith(name)]
    assert re.search(r"\b[4-7]\.\d+", kernel)
    assert re.match(r"yes|no\b|not known", types)
    assert re.match(r"\*\*tried\*\*|read|no:", verdict)


def test_write_a_policy_names_every_field_of_the_spec() -> None:
    crd = yaml.load((ROOT / "charts/probefleet/files/crds/probepolicies.yaml").read_text(), yaml.CSafeLoader)
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    text = (ROOT / "docs/write-a-policy.md").read_text()
    words = set(re.findall(r"\w+", " ".join(INLINE.findall(text) + re.findall(r"^## (.*)$", text, re.M))))
    output = spec["outputs"]["items"]["properties"]
    target = spec["attach"]["items"]["properties"]
    wanted = {*spec, *output, *target, *spec["program"]["properties"], *spec["budget"]["properties"]} - {"program"}
    assert sorted(wanted - words - {"name"}) == []
    assert {kind.value for kind in values.Kind} <= words


def test_troubleshooting_names_every_reason_that_a_node_gives() -> None:
    """StalePush answers a push, and is no policy's."""
    given = {*agent_errors._REASONS.values()}
    for path in (ROOT / "node_agent/probefleet_agent").rglob("*.py"):
        for line in path.read_text().splitlines():
            if re.search(r"\breason\b", line):
                given |= set(re.findall(r'"((?:[A-Z][a-z]+){2,})"', line))
    table = (ROOT / "docs/troubleshooting.md").read_text().partition("## Reasons in `status.failures`")[2]
    named = {
        word for row in re.findall(r"^\| ([\w, ]+) \|", table.partition("\n## ")[0], re.M) for word in row.split(", ")
    }
    assert sorted(given - named) == ["StalePush"]


def test_read_a_report_names_every_column_and_field() -> None:
    crd = yaml.load((ROOT / "charts/probefleet/files/crds/probereports.yaml").read_text(), yaml.CSafeLoader)
    version = crd["spec"]["versions"][0]
    text = (ROOT / "docs/read-a-report.md").read_text()
    columns = {column["name"].upper() for column in version["additionalPrinterColumns"]}
    assert sorted(name for name in columns - {"TIME", "WINDOW"} if name not in text) == []
    status = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    output = status["outputs"]["items"]["properties"]
    part = output["total"]["properties"]
    words = set(re.findall(r"\w+", text))
    skipped = {"time", "columns", "query", "summary", "name", "kind", "unit", "scale", "step"}
    assert sorted({*status, *output, *part} - skipped - words) == []
