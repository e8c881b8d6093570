"""Where the files that ship with the code lie: compiled BPF objects and the catalog's folders.

``PROBEFLEET_OBJECTS`` and ``PROBEFLEET_CATALOG`` name them in the images; in a checkout they are ``build/bpf`` and
``bpf``.
"""

from __future__ import annotations

import os
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]


def objects_folder() -> Path:
    """The folder of ``<name>.bpf.o``."""
    return Path(os.environ.get("PROBEFLEET_OBJECTS") or _CHECKOUT / "build" / "bpf")


def catalog_folder() -> Path:
    """The folder of ``<probe>/probe.yaml``."""
    return Path(os.environ.get("PROBEFLEET_CATALOG") or _CHECKOUT / "bpf")


def object_bytes(name: str) -> bytes:
    """A compiled object; FileNotFoundError says how to make it."""
    path = objects_folder() / f"{name}.bpf.o"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: build it with `make bpf`, or set PROBEFLEET_OBJECTS") from None
