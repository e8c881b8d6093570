"""Probes on files in pods: found by their processes, each file once, and followed as pods come and go."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from probefleet_agent.kernel import cgroups, features, links, links_network
from probefleet_agent.kernel.spread import Spread
from probefleet_wire.v1 import plan_pb2

from tests.kernel.support import Loaded, attachment
from tests.workloads import run

COUNT = 97
ANY = """
SEC("uprobe")
int on_it(void *ctx) { return hit(); }
"""


class Pod:
    """A process with a root of its own, in a cgroup of its own."""

    def __init__(self, cgroup: Path, root: Path) -> None:
        self.group = str(cgroup.relative_to(cgroups.mount_point()))
        command = ["chroot", str(root), "/marks", "--hold", str(COUNT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout and self._process.stdout.readline().startswith(b"ready")
        (cgroup / "cgroup.procs").write_text(str(self._process.pid))

    def work(self) -> int:
        """Make the calls, and end; how many saw that somebody listens."""
        said, _ = self._process.communicate(b"xx", timeout=60)
        return int(said.split(b"heard=")[1])

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.communicate()


@contextmanager
def pods(*roots: Path) -> Iterator[list[Pod]]:
    with ExitStack() as stack:
        made = []
        for number, root in enumerate(roots):
            cgroup = stack.enter_context(run.in_cgroup(f"pod{number}"))
            made.append(Pod(cgroup, root))
            stack.callback(made[-1].close)
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A root with the program in it."""
    root = tmp_path / "one"
    root.mkdir()
    shutil.copy2(run.build() / "marks", root / "marks")
    return root


@pytest.fixture
def containers(image: Path) -> Iterator[tuple[Path, Path]]:
    """Two roots over one layer, as a container runtime makes them of one image."""
    roots = []
    try:
        for name in ("first", "second"):
            root, upper, work = (image.parent / f"{name}-{part}" for part in ("root", "upper", "work"))
            for folder in (root, upper, work):
                folder.mkdir()
            options = f"lowerdir={image},upperdir={upper},workdir={work}"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)], check=True)
            roots.append(root)
        yield roots[0], roots[1]
    finally:
        for root in roots:
            subprocess.run(["umount", str(root)], check=True)


def made(loaded: Loaded, target: plan_pb2.Attachment) -> Spread:
    found = links.spread(loaded.programs["on_it"], target, links_network.Surroundings())
    assert found is not None
    return found


def groups(*of: Pod) -> dict[str, list[str]]:
    return {f"uid-{number}": [pod.group] for number, pod in enumerate(of)}


UPROBE = attachment("on_it", uprobe={"path": "/marks", "symbol": "one", "pods": True})
USDT = attachment("on_it", usdt={"path": "/marks", "provider": "marks", "name": "two", "pods": True})


@pytest.mark.parametrize("target", [UPROBE, USDT], ids=["uprobe", "usdt"])
@pytest.mark.shows("attach/uprobe in pods")
def test_a_file_that_two_pods_share_is_probed_once(containers: tuple[Path, Path], target: plan_pb2.Attachment) -> None:
    assert links.supported(target, root="/proc/1/root") is None, "what a pod lacks is said when it is there"
    assert containers[0].stat().st_dev != containers[1].stat().st_dev
    with pods(*containers) as (one, two), Loaded(ANY, on_it=links.program_type(target)) as loaded:
        spread = made(loaded, target)
        assert len(spread.follow(groups(one, two), 1).came) == 1
        assert spread.pinnable == features.perf_link() and len(spread.fds) == int(spread.pinnable)
        heard = one.work() + two.work()
        assert heard == (2 * COUNT if target is USDT else 0)
        assert loaded.hits() == 2 * COUNT
        spread.close()


def test_files_of_two_images_are_two_places(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run.build() / "marks", other / "marks")
    with pods(image, other) as (one, two), Loaded(ANY) as loaded:
        spread = made(loaded, UPROBE)
        assert len(spread.follow(groups(one, two), 1).came) == 2
        assert (one.work(), two.work()) == (0, 0)
        assert loaded.hits() == 2 * COUNT
        spread.close()


def test_a_pod_that_comes_is_probed_and_one_that_goes_is_let_go(image: Path) -> None:
    with Loaded(ANY) as loaded:
        spread = made(loaded, UPROBE)
        assert spread.follow({}, 1).came == () and spread.way == "uprobe /marks in pods on nothing yet"
        with pods(image) as (one,):
            assert spread.follow(groups(one), 2).came == ("/marks of pod uid-0",)
            one.work()
            assert loaded.hits() == COUNT
            assert spread.follow(groups(one), 3).gone == (0,), "no process of it is left"
            assert spread.sentences() == [], "and nothing of it is missed"
        with pods(image) as (two,):
            two.work()
            assert loaded.hits() == COUNT, "detached"
        spread.close()


def test_a_pod_that_lacks_the_file_is_said(image: Path) -> None:
    target = attachment("on_it", uprobe={"path": "/elsewhere", "symbol": "one", "pods": True})
    with pods(image) as (one,), Loaded(ANY) as loaded:
        spread = made(loaded, target)
        spread.follow(groups(one), 1)
        assert spread.sentences() == ["pod uid-0 has no /elsewhere now"]
        spread.close()


def test_a_pod_whose_file_lacks_the_function_is_said(image: Path) -> None:
    target = attachment("on_it", uprobe={"path": "/marks", "symbol": "three", "pods": True})
    with pods(image) as (one,), Loaded(ANY) as loaded:
        spread = made(loaded, target)
        spread.follow(groups(one), 1)
        (said,) = spread.sentences()
        assert said.startswith("/marks of pod uid-0: no function three")
