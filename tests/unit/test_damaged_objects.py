"""Damaged objects on their way to a plan: planned or refused in words, whatever became of their bytes."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import pytest
from probefleet_cli import sources
from probefleet_core import catalog, errors, planner, values
from probefleet_core import policy as policy_module
from probefleet_wire import elf_strip

from tests.fakes.damage import damaged
from tests.unit.test_network_programs import COUNTS, DECIDES, compiled

ROUNDS = 150
#: No object of 100 KB may hold the operator up for longer, however it is damaged; the machine may be busy.
MOST_SECONDS = 5.0
TAIL_CALLS = """
SEC("xdp") int jumps(struct xdp_md *ctx) { bpf_tail_call(ctx, &slots, 1); return XDP_DROP; }
"""
ATTACH = {
    "network": [
        {"program": name, "xdp": {"interfaces": ["eth0"]}} for name in ("counts_all", "first", "second", "jumps")
    ] + [{"program": "third", "tc": {"interfaces": ["eth0"], "direction": "ingress"}}],
    "profile": [{"program": "on_sample", "perfEvent": {"event": "cpu-clock", "frequency": 97}}],
}  # fmt: skip
OUTPUTS = {
    "network": [{"name": "counts", "from": {"map": "counts"}, "topk": {}}],
}


@pytest.fixture(scope="module")
def probes() -> catalog.Catalog:
    return sources.load_catalog()


def whole(name: str) -> bytes:
    if name == "network":
        return elf_strip.without_debug(compiled(COUNTS + DECIDES + TAIL_CALLS))
    return (Path(__file__).resolve().parents[2] / "build/bpf" / f"{name}.bpf.o").read_bytes()


def read(name: str, data: bytes) -> values.ProbePolicy:
    spec = {
        "scope": "Cluster",
        "program": {
            "object": {"configMapKeyRef": {"name": "o", "key": "o"}, "sha256": hashlib.sha256(data).hexdigest()}
        },
        **({"attach": ATTACH[name]} if name in ATTACH else {}),
        **({"outputs": OUTPUTS[name]} if name in OUTPUTS else {}),
        "budget": {"mapMemory": "4Gi"},
    }
    return policy_module.parse_policy(
        {"apiVersion": "probefleet.io/v1alpha1", "kind": "ProbePolicy", "metadata": {"name": name}, "spec": spec}
    )


@pytest.mark.parametrize("name", ["network", "execsnoop", "profile", "tcplife", "syscount"])
def test_a_damaged_object_is_planned_or_refused_in_words(name: str, probes: catalog.Catalog) -> None:
    good = whole(name)
    planner.plan(read(name, good), catalog=probes, elf=good, probe_maps={})
    planned = refused = 0
    for number in range(ROUNDS):
        data = damaged(good, random.Random(f"{name} {number}"))
        begun = time.monotonic()
        try:
            planner.plan(read(name, data), catalog=probes, elf=data, probe_maps={})
            planned += 1
        except errors.PolicyRefused as refusal:
            refused += 1
            assert 20 < len(str(refusal)) < 10_000, f"round {number}"
        assert time.monotonic() - begun < MOST_SECONDS, f"round {number}"
    assert planned + refused == ROUNDS and refused > ROUNDS // 4


@pytest.mark.parametrize("name", ["network", "execsnoop"])
def test_every_object_that_is_cut_short_is_refused(name: str, probes: catalog.Catalog) -> None:
    good = whole(name)
    for length in (*range(0, len(good), len(good) // 97), len(good) - 1):
        data = good[:length]
        with pytest.raises(errors.PolicyRefused, match="not an object that can be read"):
            planner.plan(read(name, data), catalog=probes, elf=data, probe_maps={})
