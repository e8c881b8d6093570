"""Imports of libraries that bring along others only because these are installed.

kopf imports the whole Kubernetes client (20 MiB), to know its objects if it is handed any, and structlog imports rich
(5 MiB), for tracebacks in colour. The processes that stay hand over JSON, and print JSON. Called around such an import,
at the top of a module.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """Until the block ends there is no such package to import, if nobody has imported it before."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules[package]
