"""What kernel tests share: objects compiled on the spot, counters read exactly, workloads of a known, prime size.

These tests load real programs into the running kernel: they need root (or CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN),
clang and libbpf's headers. Run them with ``pytest tests/kernel``. A test that needs something this kernel lacks says
what by ``needs(...)``: it is skipped with that name, and fails instead when PROBEFLEET_TEST_FORCE names the feature.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from probefleet_agent.engine import Engine
from probefleet_agent.kernel import mounts, pins

from tests.kernel import host_compilers, support, vm_questions

# In a virtual machine the host's: what takes 15 s there takes one on the host.
host_compilers.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kernel)
        if Path(__file__).parent / "vm_only" in item.path.parents:
            item.add_marker(pytest.mark.vm_only)


@pytest.fixture(scope="session", autouse=True)
def _mounted() -> None:
    mounts.mount_bpffs()
    mounts.mount_tracefs()


@pytest.fixture(scope="module", autouse=True)
def _compilers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of compiling have this machine's compilers work, whatever they made before."""
    own = request.node.get_closest_marker("compiles") is not None and not vm_questions.there()
    if own:
        host_compilers.uninstall()
    yield
    if own:
        host_compilers.install()


@pytest.fixture(autouse=True)
def _no_leaked_descriptors() -> Iterator[None]:
    """A test that leaves descriptors open fails."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def root(tmp_path: Path) -> Iterator[pins.Root]:
    """A tree of pins of this test's own, on a bpffs of its own, gone after it."""
    mounts.mount_bpffs(tmp_path / "bpffs")
    tree = pins.root(tmp_path / "bpffs")
    tree.create()
    try:
        yield tree
    finally:
        tree.purge()
        subprocess.run(["umount", str(tmp_path / "bpffs")], check=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of bpffs for an engine of the test's own; what the engine left there is removed after it."""
    path = mounts.mount_bpffs() / f"probefleet-test-{os.getpid()}"
    path.mkdir(exist_ok=True)
    yield path
    with Engine.open(bpffs=path) as engine:
        engine.remove_everything()
    path.rmdir()


@pytest.fixture
def compile_object() -> Callable[[str], bytes]:
    """C in, the bytes of a BPF object out (``tests.kernel.support.compile_object``)."""
    return support.compile_object
