"""``probefleet explain``: what it says of programs, pins, bytes and rights before anything runs is so when it runs."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from probefleet_agent.kernel import maps, syscall
from probefleet_core import quantities

from tests.kernel import policies
from tests.kernel.test_cli_run import finish, start

#: A ProbeMap, a program in C that writes to it, and one of BCC that reads it.
SHARED = Path(__file__).resolve().parents[2] / "examples/shared-map.yaml"
CREATE = "create probepolicies.probefleet.io"
OWN = ["use-cluster-scope probepolicies.probefleet.io", "use-program probepolicies.probefleet.io"]


def explained(*words: object) -> list[dict[str, list[str]]]:
    """What is said of each policy: title → lines."""
    said, _ = finish(start("explain", *words))
    found = []
    for block in said.split("\n\n"):
        lines: dict[str, list[str]] = {}
        title = ""
        for line in block.splitlines()[1:]:
            title = line[2:11].strip() or title
            lines.setdefault(title, []).append(line[12:])
        found.append(lines)
    return found


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * quantities.BYTES_PER_UNIT[unit.removesuffix("B")]


def test_what_is_explained_is_what_is_pinned() -> None:
    in_c, of_bcc = explained(SHARED)
    with policies.run(*yaml.safe_load_all(SHARED.read_text())) as running:
        here = policies.folder()
        there = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
        digests = [each.planned.plan.instance.digest for each in running.measured.prepared]
    assert [each["digest"][0].partition(":")[0] for each in (in_c, of_bcc)] == digests
    assert in_c["programs"] == ["on_openat: tracepoint syscalls:sys_enter_openat"]
    told = set(in_c["pins"])
    of_it = {path for path in there if digests[0] in path or path.startswith("probefleet/maps/")}
    assert [path for path in of_it if not any(fnmatchcase(path, pattern) for pattern in told)] == []
    assert [pattern for pattern in told if not any(fnmatchcase(path, pattern) for path in of_it)] == []
    # Of BCC's program only what is shared is known before a node has compiled it.
    assert all(any(fnmatchcase(path, pattern) for path in there) for pattern in of_bcc["pins"])


def test_a_policy_that_writes_into_maps_shares_its_program_with_nobody() -> None:
    (found,) = explained(SHARED.with_name("tail-calls.yaml"))
    assert found["digest"][0].endswith(": this policy's own, for what it writes into maps")
    assert "ignore_syscall: jumped to by syscalls[21, 22, 25]" in found["programs"]


def test_bytes_are_those_of_the_kernel_times_the_nodes() -> None:
    in_c, of_bcc = explained(SHARED, "--nodes", "5")
    with policies.run(*yaml.safe_load_all(SHARED.read_text())) as running:
        digest = running.measured.prepared[0].planned.plan.instance.digest
        used = 0
        for path in (policies.folder() / "probefleet/instances" / digest).glob("map_*"):
            with syscall.obj_get(str(path)) as fd:
                used += maps.memory_used_bytes(fd)
    one, _, whole = in_c["map bytes"][0].partition(" × 5 nodes = ")
    assert in_bytes(one) == pytest.approx(used, rel=0.1)
    assert in_bytes(whole) == pytest.approx(5 * used, rel=0.1)
    assert of_bcc["map bytes"][0].startswith("at most 32.0 MiB × 5 nodes = 160 MiB (the budget: ")


def test_rights_are_those_that_admission_asks_for(tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.yaml"
    spec = {"program": {"catalog": {"name": "syscount"}}}
    manifest = {"apiVersion": "probefleet.io/v1alpha1", "kind": "ProbePolicy", "metadata": {"name": "n"}, "spec": spec}
    narrow.write_text(yaml.safe_dump(manifest))
    needs = [each["needs"] for each in explained(narrow, "runqlat", SHARED)]
    assert needs == [[CREATE], [CREATE, OWN[0]], [CREATE, *OWN], [CREATE, *OWN]]
