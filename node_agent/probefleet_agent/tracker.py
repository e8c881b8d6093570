"""Keeps the pinned map ``cgroups`` (id → path) alive and reads it: the source of every identity on this node.

A program on ``cgroup_mkdir`` fills it in the kernel (``bpf/agent/cgroups.bpf.c``), so that pods which end within a
second, or while the agent restarts, still have names. At its first start the cgroups that exist already are put in
as well. The program is attached before they are looked for, so none falls in between.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Collection

import numpy as np
from probefleet_wire import resources
from probefleet_wire.v1 import plan_pb2

from probefleet_agent.kernel import cgroups, libbpf, links, maps, pins, syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.pods import CgroupId

PATH_BYTES = 256
#: When the agent was last alive (wall clock, ns), and the term and version of the last push.
_NOTES = struct.Struct("<QQQ")
_PROGRAM = "on_cgroup_mkdir"
_ATTACHMENT = plan_pb2.Attachment(program=_PROGRAM, raw_tracepoint=plan_pb2.RawTracepoint(name="cgroup_mkdir"))


class Tracker:
    """The node's memory of cgroups. Use as a context manager: pins stay, descriptors go."""

    def __init__(self, root: pins.Root) -> None:
        self._owned = contextlib.ExitStack()
        self._remembered = 0
        try:
            self._cgroups, self._lost, self._beat = self._adopt(root) or self._load(root)
        except BaseException:
            self._owned.close()
            raise
        self._info = maps.info(self._cgroups)
        self.stopped_ns, self.term, self.version = self._read_notes()

    def paths(self) -> dict[CgroupId, str]:
        """Every cgroup remembered, by id."""
        keys, values = maps.read(self._cgroups, self._info)
        ids = np.ascontiguousarray(keys).view(np.uint64).reshape(-1).tolist()
        self._remembered = len(ids)
        texts = np.ascontiguousarray(values).view(f"S{PATH_BYTES}").reshape(-1).tolist()
        return {CgroupId(id_): text.decode(errors="replace") for id_, text in zip(ids, texts, strict=True)}

    def scan(self) -> dict[CgroupId, str]:
        """Look at the tree itself, and remember what is new."""
        found = {CgroupId(id_): path for id_, path in cgroups.scan().items()}
        known = self.paths()
        new = {id_: path for id_, path in found.items() if id_ not in known}
        room = self._info.max_entries - len(known)
        for id_, path in list(new.items())[: max(room, 0)]:
            value = path.encode()[: PATH_BYTES - 1].ljust(PATH_BYTES, b"\0")
            syscall.map_update(self._cgroups, int(id_).to_bytes(8, "little"), value)
        return found

    @property
    def crowded(self) -> bool:
        """Is more than half of the map taken, as far as ``paths`` last saw?"""
        return self._remembered > self._info.max_entries // 2

    def forget(self, gone: Collection[CgroupId]) -> None:
        """Give the room of these back: they are gone, and nothing speaks of them any more."""
        maps.delete_many(self._cgroups, np.array(sorted(gone), np.uint64).view(np.uint8).reshape(-1, 8))

    def lost(self) -> int:
        """Cgroups that found no room in the map."""
        return int(maps.sum_lost(self._lost)[0])

    def beat(self, now_ns: int) -> None:
        """Note that the agent is alive, so that the next one knows since when it was not."""
        syscall.map_update(self._beat, bytes(4), _NOTES.pack(now_ns, self.term, self.version))

    def note_push(self, term: int, version: int) -> None:
        """Note which push was carried out last."""
        self.term, self.version = term, version
        self.beat(time.time_ns())

    def close(self) -> None:
        """Let go of the descriptors."""
        self._owned.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_notes(self) -> tuple[int, int, int]:
        beat, term, version = _NOTES.unpack(syscall.map_lookup(self._beat, bytes(4), _NOTES.size) or bytes(_NOTES.size))
        return beat, term, version

    def _adopt(self, root: pins.Root) -> tuple[Fd, Fd, Fd] | None:
        found = [root.identity_map(name) for name in ("cgroups", "lost", "beat", "link")]
        present = [fd for fd in found if fd is not None]
        for fd in present:
            self._owned.callback(fd.close)
        if len(present) < len(found):
            # Half of it: an earlier start was interrupted. Programs of instances are not touched.
            root.remove_identity()
            root.identity.mkdir(mode=0o700, parents=True, exist_ok=True)
            return None
        if maps.info(present[2]).value_size != _NOTES.size:
            root.remove_identity()  # of an older agent
            root.identity.mkdir(mode=0o700, parents=True, exist_ok=True)
            return None
        return present[0], present[1], present[2]

    def _load(self, root: pins.Root) -> tuple[Fd, Fd, Fd]:
        with libbpf.open_object(resources.object_bytes("cgroups"), "cgroups") as opened:
            opened.load()
            table = self._own(opened.map_fd("cgroups"))
            lost = self._own(opened.map_fd("probefleet_lost"))
            program = self._own(opened.program_fd(_PROGRAM))
        beat = self._own(
            syscall.map_create(MapType.ARRAY, key_size=4, value_size=_NOTES.size, max_entries=1, name="pf_beat")
        )
        link = links.attach(program, _ATTACHMENT)
        self._owned.callback(link.close)
        self._cgroups, self._info = table, maps.info(table)
        self.scan()
        root.pin_identity("cgroups", table)
        root.pin_identity("lost", lost)
        root.pin_identity("beat", beat)
        if link.pinnable:
            root.pin_identity("link", link.fd)
        return table, lost, beat

    def _own(self, fd: Fd) -> Fd:
        self._owned.callback(fd.close)
        return fd
