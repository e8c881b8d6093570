"""A wheel holds the catalog where it has been built (`make plugin`): `kubectl probefleet` on a machine of one's own has
no `bpf/` beside its packages. Images have the catalog in a layer of its own, and their source tree has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Catalog(BuildHookInterface):  # type: ignore[type-arg]  # of its configuration, which this one has none of
    """Puts each probe's folder and object into ``probefleet_core/bpf``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """hatchling's; an editable installation reads the tree itself."""
        root = Path(self.root)
        if version == "editable":
            return
        for probe in sorted(root.glob("bpf/*/probe.yaml")):
            name = probe.parent.name
            built = root / "build" / "bpf" / f"{name}.bpf.o"
            if built.is_file():
                build_data["force_include"][str(probe.parent)] = f"probefleet_core/bpf/{name}"
                build_data["force_include"][str(built)] = f"probefleet_core/bpf/{name}/{built.name}"
