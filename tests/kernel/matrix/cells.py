"""The rows of the table of kernels, from the code itself: what a policy can name, and what lies in bpf/ and examples/.

A test says which of them it shows by `@pytest.mark.shows("attach/kprobe")`; words in braces are its parameters'.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from probefleet_core import attach_shape, policy_shape
from probefleet_wire import map_types

ROOT = Path(__file__).parents[3]
TITLES = {
    "program": "Programs of a policy",
    "attach": "Attachments",
    "map": "Map types",
    "probe": "Catalog probes",
    "example": "Examples",
    "besides": "Besides",
}
#: What an attachment can be besides its kind.
MORE_WAYS = (
    "kprobe by pattern",
    "uprobe in pods",
    "library by name",
    "pinned links outlive the agent",
    "a CPU that comes online",
)
BESIDES = {
    "clang": "clang runs locked in on the node",
    "bcc": "BCC runs locked in on the node",
    "bcc-offsets": "BCC reads every member where BTF has it",
    "cgroup-v1": "pods told apart: cgroup v1 and cgroup2 side by side",
    "cgroup-v2": "pods told apart: cgroup2 alone",
    "cost": "programs' time",
}
#: Map types that programs here cannot use: no test could show anything.
_NO_ROW = frozenset({map_types.MapType.STRUCT_OPS, map_types.MapType.ARENA})


def rows() -> Mapping[str, tuple[str, ...]]:
    """Section → its rows, in the order of the table."""
    files = sorted((ROOT / "examples").glob("*.yaml"))
    kinds = [map_types.name_of(kind) for kind in map_types.MapType if kind not in _NO_ROW]
    return {
        "program": tuple(policy_shape.PROGRAMS),
        "attach": (*attach_shape.TARGETS, *MORE_WAYS),
        "map": (*kinds, "global-data"),
        "probe": tuple(sorted(file.parent.name for file in (ROOT / "bpf").glob("*/probe.yaml"))),
        "example": tuple(file.stem for file in files if "kind: ProbePolicy" in file.read_text()),
        "besides": tuple(BESIDES),
    }


def cells() -> tuple[str, ...]:
    """Every cell's name, such as `map/lru-hash`."""
    return tuple(f"{section}/{row}" for section, names in rows().items() for row in names)


def third(turn: int) -> frozenset[str]:
    """Every third cell, and the others the next two times."""
    return frozenset(cells()[turn % 3 :: 3])


def named(pattern: str, parameters: Mapping[str, object]) -> str:
    """A mark's text with its test's parameters: `map/{kind}` of `LRU_HASH` is `map/lru-hash`."""
    words = {name: str(value).lower().replace("_", "-") for name, value in parameters.items()}
    return pattern.format_map(words)
