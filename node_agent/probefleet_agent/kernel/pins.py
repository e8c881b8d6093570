"""Pins: what goes on counting while the agent is replaced. A tree in bpffs, adopted or removed as a whole.

    <bpffs>/probefleet/
    ├── instances/
    │   ├── <digest>/            an instance: adopted at start, all of it or nothing
    │   │   ├── map_<name>  prog_<name>  link_<n>_<program>
    │   │   ├── base_<policy>    what maps held when that policy joined: bytes in an array map
    │   │   └── manifest         an array map of one entry: our own bytes, which live exactly as long as the pins
    │   ├── new-<digest>/        being built; swept away at start
    │   └── gone-<digest>/       being removed; swept away at start
    ├── maps/<probe map uid>/    map, manifest
    ├── exchange/manifest        there only while several folders take the places of others: who starts finishes it
    └── identity/…               the agent's own: cgroup id → path

``execute`` builds and removes, ``engine`` adopts at start. bpffs refuses regular files (hence the manifest map) and
names with a dot (written as ``%``); renaming a folder of pins is atomic.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsIndex

from probefleet_agent.errors import KernelError, ProbefleetError
from probefleet_agent.kernel import mounts, syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import MapType

_NEW, _GONE = "new-", "gone-"
_MANIFEST = "manifest"
_BASELINE = "base_"
_HEADER = struct.Struct("<8sQ32s")  # magic, length, sha256 of what follows
_MAGIC = b"probefl1"
MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Pinned:
    """An instance's (or probe map's) pins, opened: the owner closes it."""

    digest: str
    manifest: bytes
    maps: dict[str, Fd] = field(default_factory=dict)
    programs: dict[str, Fd] = field(default_factory=dict)
    links: dict[str, list[Fd]] = field(default_factory=dict)  # program → its links, in order
    numbered: dict[int, Fd] = field(default_factory=dict)  # the same links by the numbers of their pins

    def close(self) -> None:
        """Close the descriptors; the pins stay."""
        for fd in (*self.maps.values(), *self.programs.values(), *(fd for fds in self.links.values() for fd in fds)):
            fd.close()

    def __enter__(self) -> Pinned:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of pins while it is built."""

    path: Path

    def pin_map(self, name: str, fd: SupportsIndex) -> None:
        """Pin a map under its own name."""
        syscall.obj_pin(fd, str(self.path / f"map_{_escaped(name)}"))

    def pin_program(self, name: str, fd: SupportsIndex) -> None:
        """Pin a program: needed by program arrays, and to ask an adopted one for its cost without CAP_SYS_ADMIN."""
        syscall.obj_pin(fd, str(self.path / f"prog_{_escaped(name)}"))

    def pin_link(self, number: int, program: str, fd: SupportsIndex) -> None:
        """Pin a link; ``number`` tells apart several of one program (one a CPU, one an attachment)."""
        syscall.obj_pin(fd, str(self.path / f"link_{number}_{_escaped(program)}"))

    def unpin_link(self, number: int, program: str) -> None:
        """Detach what ``pin_link`` pinned, unless a descriptor holds it."""
        (self.path / f"link_{number}_{_escaped(program)}").unlink(missing_ok=True)

    def write_manifest(self, data: bytes) -> None:
        """Keep bytes beside the pins; a second call replaces the first at once."""
        _write_manifest(self.path, data)

    def remove(self) -> None:
        """Give it up: all that it holds is unpinned."""
        _remove_tree(self.path)

    def pin_baseline(self, policy: str, fd: SupportsIndex) -> None:
        """Pin the array that holds a policy's baseline, in place of the one before."""
        name = f"{_BASELINE}{_escaped(policy)}"
        _pin_in_place(self.path, name, fd)

    def open_baseline(self, policy: str) -> Fd:
        """The array that holds a policy's baseline. KernelError ENOENT where there is none."""
        return syscall.obj_get(str(self.path / f"{_BASELINE}{_escaped(policy)}"))

    def unpin_baseline(self, policy: str) -> None:
        """Forget it."""
        (self.path / f"{_BASELINE}{_escaped(policy)}").unlink(missing_ok=True)

    def list_baselines(self) -> list[str]:
        """The policies that one is kept for."""
        return [path.name.removeprefix(_BASELINE).replace("%", ".") for path in sorted(self.path.glob(f"{_BASELINE}*"))]


class Root:
    """The tree under one bpffs."""

    def __init__(self, bpffs: Path) -> None:
        self.path = bpffs / "probefleet"
        self.instances = self.path / "instances"
        self.maps = self.path / "maps"
        self.identity = self.path / "identity"
        self._exchange = self.path / "exchange"

    def create(self) -> None:
        """Mount bpffs where it is missing, make the folders, sweep away what a dead agent left half done."""
        mounts.mount_bpffs(self.path.parent)
        for folder in (self.instances, self.maps, self.identity):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sweep()

    def sweep(self) -> list[str]:
        """Remove half-built and half-removed folders; their names. Only while no other agent works on this tree.

        An exchange that was decided is finished before: its new folders are no half-built ones.
        """
        self._finish_exchange()
        swept = []
        for parent in (self.instances, self.maps):
            for path in _folders(parent):
                if path.name.startswith((_NEW, _GONE)):
                    _remove_tree(path)
                    swept.append(path.name)
        return swept

    def list_instances(self) -> list[str]:
        """Digests of complete instances."""
        return [path.name for path in _folders(self.instances) if not path.name.startswith((_NEW, _GONE))]

    def list_maps(self) -> list[str]:
        """Uids of complete probe maps."""
        return [path.name for path in _folders(self.maps) if not path.name.startswith((_NEW, _GONE))]

    def staging(self, digest: str) -> contextlib.AbstractContextManager[Folder]:
        """Build an instance: pinned in the ``with`` block, there as a whole after it, or not at all."""
        return _staging(self.instances, digest)

    def staging_map(self, uid: str) -> contextlib.AbstractContextManager[Folder]:
        """Build a probe map: pin it with ``pin_map("map", fd)`` and write its manifest."""
        return _staging(self.maps, uid)

    def beside(self, digest: str) -> Folder:
        """A new folder for what is to take an instance's place; it stays aside until ``exchange``."""
        return _aside(self.instances, digest)

    def beside_map(self, uid: str) -> Folder:
        """A new folder for what is to take a probe map's place; it stays aside until ``exchange``."""
        return _aside(self.maps, uid)

    def exchange(self, instances: Sequence[str], uids: Sequence[str]) -> None:
        """What was built beside these takes their places: all of it or nothing, whenever the process dies.

        One pin decides: from the moment that it is there, who starts next does what is left to do.
        """
        self._exchange.mkdir(mode=0o700, exist_ok=True)
        names = {"instances": [_checked(each) for each in instances], "maps": [_checked(each) for each in uids]}
        _write_manifest(self._exchange, json.dumps(names).encode())
        self._finish_exchange()

    def _finish_exchange(self) -> None:
        try:
            names = json.loads(_read_manifest(self._exchange))
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
        else:
            for parent, key in ((self.maps, "maps"), (self.instances, "instances")):
                for name in names[key]:
                    fresh = parent / f"{_NEW}{_checked(name)}"
                    if fresh.exists():  # else it is in its place already
                        _remove(parent, name)
                        fresh.rename(parent / name)
        _remove_tree(self._exchange)

    def detach(self, digest: str) -> list[int]:
        """Unpin all of an instance's links; their ids, which are gone from the kernel when it has let go of them."""
        ids = []
        for entry in sorted((self.instances / _checked(digest)).glob("link_*")):
            with contextlib.suppress(KernelError), syscall.obj_get(str(entry)) as link:
                ids.append(syscall.link_info(link).id)
            _unpin_link(entry)
        return ids

    def open_instance(self, digest: str) -> Pinned:
        """Open all pins of an instance. KernelError ENOENT where it, or its manifest, is not there."""
        return _open(self.instances / _checked(digest))

    def open_map(self, uid: str) -> Pinned:
        """Open a probe map: ``.maps["map"]``."""
        return _open(self.maps / _checked(uid))

    def remove(self, digest: str) -> bool:
        """Detach and forget an instance, as a whole: whether there was one."""
        return _remove(self.instances, digest)

    def remove_map(self, uid: str) -> bool:
        """Forget a probe map; it lives on in programs that use it."""
        return _remove(self.maps, uid)

    def folder(self, digest: str) -> Folder:
        """A complete instance, to pin more links in it or take some away."""
        return Folder(self.instances / _checked(digest))

    def map_folder(self, uid: str) -> Folder:
        """A complete probe map, to write its manifest anew."""
        return Folder(self.maps / _checked(uid))

    def read_manifest(self, digest: str) -> bytes:
        """An instance's manifest, without opening the rest."""
        return _read_manifest(self.instances / _checked(digest))

    def write_manifest(self, digest: str, data: bytes) -> None:
        """Replace an instance's manifest at once: a reader sees the old one or the new one."""
        _write_manifest(self.instances / _checked(digest), data)

    def identity_map(self, name: str) -> Fd | None:
        """The agent's own map of that name, where it is pinned."""
        try:
            return syscall.obj_get(str(self.identity / _escaped(name)))
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def pin_identity(self, name: str, fd: SupportsIndex) -> None:
        """Pin one of the agent's own maps, programs or links."""
        syscall.obj_pin(fd, str(self.identity / _escaped(name)))

    def remove_identity(self) -> None:
        """Forget all that is the agent's own."""
        _remove_tree(self.identity)

    def purge(self) -> None:
        """Remove the whole tree: every instance, map and identity of ours on this node."""
        for digest in self.list_instances():
            self.remove(digest)
        for uid in self.list_maps():
            self.remove_map(uid)
        if self.path.exists():
            self.sweep()
            _remove_tree(self.path)


def root(bpffs: Path = mounts.BPFFS) -> Root:
    """The tree under that bpffs; nothing is made before ``create``."""
    return Root(bpffs)


def _escaped(name: str) -> str:
    if not name or "/" in name or "%" in name or len(name) > 200:
        raise ProbefleetError(f"{name!r} cannot be the name of a pin")
    return name.replace(".", "%")


def _checked(digest: str) -> str:
    plain = all(c.isascii() and (c.isalnum() or c in "-_") for c in digest)
    if not digest or not plain or digest.startswith((_NEW, _GONE)):
        raise ProbefleetError(f"{digest!r} cannot be the name of a folder of pins")
    return digest


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def _staging(parent: Path, digest: str) -> Iterator[Folder]:
    path, final = parent / f"{_NEW}{_checked(digest)}", parent / digest
    if final.exists():
        raise KernelError(errno.EEXIST, f"make {final}")
    _remove_tree(path)
    path.mkdir(mode=0o700, parents=True)
    try:
        yield Folder(path)
        path.rename(final)
    except BaseException:
        _remove_tree(path)
        raise


def _aside(parent: Path, digest: str) -> Folder:
    path = parent / f"{_NEW}{_checked(digest)}"
    _remove_tree(path)
    path.mkdir(mode=0o700, parents=True)
    return Folder(path)


def _remove(parent: Path, digest: str) -> bool:
    """First the name, then the contents: who looks in between sees nothing rather than half."""
    path, gone = parent / _checked(digest), parent / f"{_GONE}{digest}"
    _remove_tree(gone)
    try:
        path.rename(gone)
    except FileNotFoundError:
        return False
    _remove_tree(gone)
    return True


def _remove_tree(path: Path) -> None:
    """Links first (so that counting stops at one moment), then the rest. What is gone already is fine."""
    try:
        entries = sorted(path.iterdir(), key=lambda each: (not each.name.startswith("link_"), each.name))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            _remove_tree(entry)
        elif entry.name.startswith("link_"):
            _unpin_link(entry)
        else:
            entry.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()


def _unpin_link(path: Path) -> None:
    """Detach now: the last reference of a pin is let go by a kernel worker some ms later, that of a descriptor at once.

    (Before Linux 6.9 the pin's own reference goes after RCU, so there it still takes some milliseconds.)
    """
    try:
        link = syscall.obj_get(str(path))
    except KernelError:
        path.unlink(missing_ok=True)
        return
    with link:
        path.unlink(missing_ok=True)


def _open(path: Path) -> Pinned:
    pinned = Pinned(path.name, _read_manifest(path))
    links: dict[str, list[tuple[int, Fd]]] = {}
    try:
        for entry in sorted(path.iterdir()):
            kind, _, name = entry.name.replace("%", ".").partition("_")
            if kind == "map":
                pinned.maps[name] = syscall.obj_get(str(entry))
            elif kind == "prog":
                pinned.programs[name] = syscall.obj_get(str(entry))
            elif kind == "link":
                number, _, program = name.partition("_")
                links.setdefault(program, []).append((int(number), syscall.obj_get(str(entry))))
    except BaseException:
        pinned.close()
        for pairs in links.values():
            for _, fd in pairs:
                fd.close()
        raise
    for program, pairs in links.items():
        pinned.links[program] = [fd for _, fd in sorted(pairs, key=lambda pair: pair[0])]
        pinned.numbered.update(pairs)
    return pinned


def _write_manifest(path: Path, data: bytes) -> None:
    if len(data) > MAX_MANIFEST_BYTES:
        raise ProbefleetError(f"a manifest of {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are kept")
    value = _HEADER.pack(_MAGIC, len(data), hashlib.sha256(data).digest()) + data
    with syscall.map_create(
        MapType.ARRAY, key_size=4, value_size=len(value), max_entries=1, name="pf_manifest"
    ) as fd:  # fmt: skip
        syscall.map_update(fd, bytes(4), value)
        _pin_in_place(path, _MANIFEST, fd)


def _pin_in_place(path: Path, name: str, fd: SupportsIndex) -> None:
    fresh = path / f"{_NEW}{name}"
    fresh.unlink(missing_ok=True)
    syscall.obj_pin(fd, str(fresh))
    fresh.replace(path / name)


def _read_manifest(path: Path) -> bytes:
    with syscall.obj_get(str(path / _MANIFEST)) as fd:
        info = syscall.map_info(fd)
        if info.type != MapType.ARRAY or info.key_size != 4 or info.value_size < _HEADER.size:
            raise ProbefleetError(f"{path / _MANIFEST} is not a manifest of ours")
        value = syscall.map_lookup(fd, bytes(4), info.value_size) or b""
    magic, length, digest = _HEADER.unpack_from(value)
    data = value[_HEADER.size : _HEADER.size + length]
    if magic != _MAGIC or len(data) != length or hashlib.sha256(data).digest() != digest:
        raise ProbefleetError(f"{path / _MANIFEST} is damaged: remove the folder with `probefleet purge`")
    return data
