"""Files of user space on another root than our own: an absolute path or a library's name in, a path to open out.

``links_user`` and ``links_usdt`` ask. The root is the node's ("/proc/1/root") or a process's ("/proc/PID/root"), so
symbolic links are followed below it and never out of it. A library's name ("libc", "ssl", "libpq.so.5") is looked up as
the loader of that root does, in its ld.so.cache, and then in the folders where libraries and programs lie.
"""

from __future__ import annotations

import os
import platform
import struct
from pathlib import Path

from probefleet_agent.errors import NoSuchTarget
from probefleet_agent.kernel import roots, targets

# sysdeps/generic/dl-cache.h of glibc: header of the new format, and one entry.
_MAGIC = b"glibc-ld.so.cache1.1"
_HEADER = struct.Struct("<20sIIB3xI12x")
_ENTRY = struct.Struct("<iIIIQ")
# FLAG_ELF_LIBC6 with the machine's own 64-bit word.
_FLAGS = {"x86_64": 0x0303, "aarch64": 0x0A03}
_LIBRARY_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")
_PROGRAM_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
MAX_CACHE_BYTES = 16 << 20


def locate(path: str, root: str = "") -> str:
    """Where to open a file: ``path`` below ``root``, or the library or program of that name there. NoSuchTarget."""
    root = root.rstrip("/")
    if path.startswith("/"):
        return roots.in_root(path, root) if root else path
    found = _by_name(path, root)
    if found is None:
        near = targets.near(path, sorted({name.partition(".so")[0] for name in _cached(root)}))
        raise NoSuchTarget(f"library or program {path}", near, where="on this node")
    return roots.in_root(found, root)


def _by_name(name: str, root: str) -> str | None:
    cached = _cached(root)
    stem = name if name.startswith("lib") else f"lib{name}"
    for wanted in (name, stem):
        for key, path in cached.items():
            if key == wanted or key.startswith(f"{wanted}.so"):
                return path
    # No cache (musl, a distroless image), or not in it.
    triplet = f"{platform.machine()}-linux-gnu"
    for folder in (*(f"{each}/{triplet}" for each in ("/lib", "/usr/lib")), *_LIBRARY_FOLDERS):
        for wanted in (name, stem):
            if found := _first(root, folder, wanted):
                return found
    for folder in _PROGRAM_FOLDERS:
        if os.path.isfile(roots.in_root(f"{folder}/{name}", root)):  # noqa: PTH113 (a root that may not be read has no files)
            return f"{folder}/{name}"
    return None


def _first(root: str, folder: str, wanted: str) -> str | None:
    try:
        names = sorted(each.name for each in Path(roots.in_root(folder, root)).iterdir())
    except OSError:
        return None
    fits = [each for each in names if each == wanted or each.startswith(f"{wanted}.so")]
    return f"{folder}/{fits[0]}" if fits else None


def _cached(root: str) -> dict[str, str]:
    """Library → path, as the loader of that root has it; empty without a cache that can be read."""
    try:
        with os.fdopen(roots.open_regular(roots.in_root("/etc/ld.so.cache", root)), "rb") as file:
            data = file.read(MAX_CACHE_BYTES)
    except OSError:
        return {}
    start = data.find(_MAGIC)  # the old format may stand before it
    if start < 0 or len(data) < start + _HEADER.size:
        return {}
    data = data[start:]
    count = _HEADER.unpack_from(data)[1]
    found: dict[str, str] = {}
    for number in range(min(count, (len(data) - _HEADER.size) // _ENTRY.size)):
        flags, key, value, _, hwcap = _ENTRY.unpack_from(data, _HEADER.size + number * _ENTRY.size)
        # Libraries for particular processors come first in the cache; which one a process took is not known here.
        if flags == _FLAGS.get(platform.machine(), flags) and not hwcap:
            found.setdefault(_text(data, key), _text(data, value))
    return found


def _text(data: bytes, start: int) -> str:
    end = data.find(b"\0", start)
    return data[start : end if end >= 0 else start].decode(errors="replace")
