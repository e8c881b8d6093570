"""Objects for plans: from clang's sandbox, from ConfigMaps, and where they are kept afterwards.

planning.py asks with a source or a reference and gets ELF bytes, or a ToolchainError that says what the user wrote
wrong. Compilers run in probefleet_wire.clang's sandboxed child, never in this process, which holds the CA's key; here
is only the waiting: a bounded number at a time, in worker threads, each source once. What came of a source is kept by
the digest of all that it depends on, mistakes included; /metrics says how often that helped.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import zstandard
from probefleet_core import values
from probefleet_wire import clang as wire_clang
from probefleet_wire import kept, sandbox

from probefleet_operator import api, errors, metrics

log = structlog.get_logger(__name__)

CONCURRENT_COMPILATIONS = 2
MAX_KEPT_BYTES = 256 << 20
MAX_OBJECT_BYTES = 8 << 20

Compile = Callable[[str, str], bytes]
"""(source, file name) → ELF; raises ToolchainError. Blocks."""


def clang(headers: Path) -> Compile:
    """The compiler of `c` policies: probefleet_wire.clang with our header tree (bpf/include)."""

    def compile_source(source: str, file_name: str) -> bytes:
        try:
            return wire_clang.compile_core(source, name=file_name, include_dirs=[headers]).object
        except wire_clang.CompileError as problem:
            raise errors.ToolchainError("CompileFailed", str(problem), lasting=problem.lasting) from problem
        except (wire_clang.ClangError, sandbox.SandboxUnavailable, OSError) as problem:
            raise errors.ToolchainUnavailable("CompilerUnavailable", str(problem)) from problem

    return compile_source


def tree_digest(folder: Path) -> bytes:
    """What every object depends on beside its source: the headers, the kernel's types (vmlinux.h) among them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = (part for path in files for part in (str(path.relative_to(folder)).encode(), path.read_bytes()))
    return bytes.fromhex(kept.digest(parts))


class Toolchain:
    """Compilations and ConfigMap reads. `headers` is `tree_digest` of what `compile_source` includes."""

    def __init__(
        self,
        client: api.Api,
        compile_source: Compile,
        headers: bytes = b"",
        *,
        max_kept_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self._client, self._compile, self._headers = client, compile_source, headers
        self._slots = asyncio.Semaphore(CONCURRENT_COMPILATIONS)
        self._kept: kept.Kept[bytes | errors.ToolchainError] = kept.Kept(max_kept_bytes)
        self._running: dict[str, asyncio.Task[bytes]] = {}

    async def compiled(self, source: str, file_name: str) -> bytes:
        """The object of C source; raises ToolchainError."""
        # The file's name too: it stands in the object's line info, and in what the compiler says.
        digest = kept.digest([file_name.encode(), source.encode(), self._headers])
        known, task = self._kept.get(digest), self._running.get(digest)
        metrics.COMPILE_CACHE.labels("hit" if known is not None or task is not None else "miss").inc()
        if isinstance(known, errors.ToolchainError):
            # Another one each time: an exception that is raised again grows a trace with every task that meets it.
            raise errors.ToolchainError(known.reason, str(known))
        if known is not None:
            return known
        if task is None:
            task = asyncio.create_task(self._compile_once(digest, source, file_name), name=f"compile-{digest[:12]}")
            self._running[digest] = task
            task.add_done_callback(lambda _: self._running.pop(digest, None))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Let go of compilations under way."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def from_config_map(self, namespace: str, reference: values.ConfigMapKey, sha256: str) -> bytes:
        """An object from a ConfigMap's binaryData (or base64 in data), checked; raises ToolchainError or ApiError."""
        where = f"ConfigMap {namespace}/{reference.name}, key {reference.key!r}"
        try:
            found = await self._client.get(f"/api/v1/namespaces/{namespace}/configmaps/{reference.name}")
        except errors.NotFound:
            raise errors.ToolchainUnavailable("ObjectMissing", f"{where}: there is no such ConfigMap") from None
        encoded = (found.get("binaryData") or {}).get(reference.key) or (found.get("data") or {}).get(reference.key)
        if encoded is None:
            raise errors.ToolchainUnavailable("ObjectMissing", f"{where}: the ConfigMap has no such key")
        try:
            data = base64.b64decode(encoded, validate=False)
        except ValueError as problem:
            raise errors.ToolchainUnavailable("ObjectUnreadable", f"{where}: not base64: {problem}") from None
        actual = hashlib.sha256(data).hexdigest()
        if actual != sha256:
            raise errors.ToolchainUnavailable(
                "ObjectDiffers",
                f"{where}: its bytes have sha256 {actual}, the policy asks for {sha256}. "
                "Write the object's own sha256sum into spec.program.object.sha256, or put the right object there.",
            )
        return data

    async def _compile_once(self, digest: str, source: str, file_name: str) -> bytes:
        async with self._slots:
            began = time.monotonic()
            try:
                elf = await asyncio.to_thread(self._compile, source, file_name)
            except errors.ToolchainUnavailable:
                raise
            except errors.ToolchainError as problem:
                if problem.lasting:
                    self._keep(digest, problem)
                raise
            finally:
                metrics.COMPILE_SECONDS.observe(time.monotonic() - began)
            if len(elf) > MAX_OBJECT_BYTES:
                raise errors.ToolchainError(
                    "ObjectTooLarge", f"{file_name}: the object has {len(elf)} bytes, more than {MAX_OBJECT_BYTES}"
                )
            self._keep(digest, elf)
            return elf

    def _keep(self, digest: str, result: bytes | errors.ToolchainError) -> None:
        self._kept.put(digest, result, _weight(result))
        metrics.COMPILE_CACHE_BYTES.set(self._kept.size_bytes)


def _weight(result: bytes | errors.ToolchainError) -> int:
    return len(result) if isinstance(result, bytes) else len(str(result)) + 100


class Blobs:
    """Objects that plans refer to, packed once for all nodes."""

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}

    def get(self, sha256: str) -> bytes | None:
        """The zstd frame of an object."""
        return self._packed.get(sha256)

    def names(self) -> set[str]:
        """sha256 of all that is kept."""
        return set(self._packed)

    def put(self, sha256: str, data: bytes) -> None:
        """Keep an object."""
        if sha256 not in self._packed:
            self._packed[sha256] = zstandard.ZstdCompressor(level=9, write_content_size=True).compress(data)

    def retain(self, wanted: set[str]) -> None:
        """Let go of objects that no plan refers to any more."""
        for sha256 in self._packed.keys() - wanted:
            del self._packed[sha256]
