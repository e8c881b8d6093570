"""Images of new nodes: unpacked once, then linked.

containerd takes 25 s of a CPU to unpack the images of Probefleet, and every node wants the same. So a containerd that
belongs to no node unpacks them, outside the tree and for later clusters too; a node begins with hard links to what
containerd writes once and never again (blobs, files of layers), and with copies of its databases. Called by `node`.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from . import settings, waiting
from .errors import ClusterError

ANSWER_SECONDS = 60.0
KEPT = 2
"""Sets of images: those of now, and those of a clone beside it."""

DATABASES = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
"""What containerd writes to again."""

_CONFIGURATION = """\
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{socket}"
"""


def fill(root: Path, archives: Sequence[Path]) -> bool:
    """Have `root`, the folder of a containerd that does not run yet, hold these images.

    False where it cannot be: what is kept lies on another file system than `root`, which cannot be linked to, and may
    be one on which containerd does not work.
    """
    store = settings.cache_directory() / "images"
    store.mkdir(parents=True, exist_ok=True)
    if not _can_link(store, root.parent):
        return False
    with (store / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for unfinished in (*store.glob("*.new"), *store.glob("*.old")):
            shutil.rmtree(unfinished)
        kept = store / _digest(archives)
        if not kept.exists():
            _unpack(kept, archives)
        os.utime(kept)
        link(kept, root)
        sets = sorted((path for path in store.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for older in sets[:-KEPT]:
            gone = older.with_suffix(".old")
            older.rename(gone)  # half of one must not look like one
            shutil.rmtree(gone)
    return True


def _can_link(store: Path, folder: Path) -> bool:
    """Asked of the kernel: two mounts of one file system have the same device number, and no links between them."""
    with tempfile.NamedTemporaryFile(dir=store, suffix=".tmp") as probe:
        link_to = folder / Path(probe.name).name
        try:
            os.link(probe.name, link_to)
        except OSError:
            return False
        link_to.unlink()
        return True


def link(kept: Path, root: Path) -> None:
    """`root` becomes what `kept` is: the same files, but for the databases, which are copies."""
    subprocess.run(["cp", "-al", str(kept), str(root)], check=True)
    for name in DATABASES:
        own = root / f"{name}.own"
        shutil.copy2(root / name, own)
        own.rename(root / name)


def _digest(archives: Sequence[Path]) -> str:
    """Of the files' names, sizes and times: reading them all would take as long as unpacking them."""
    seen = [(path.name, path.stat()) for path in archives]
    text = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in seen)
    version = subprocess.run(["containerd", "--version"], check=True, capture_output=True, text=True).stdout
    return hashlib.sha256(f"{version}{text}".encode()).hexdigest()[:16]


def _unpack(kept: Path, archives: Sequence[Path]) -> None:
    new = kept.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    with _containerd(new) as address:
        for archive in archives:
            load(address, archive)
    new.rename(kept)


@contextmanager
def _containerd(root: Path) -> Iterator[Path]:
    """A containerd that runs no pods; its socket."""
    with ExitStack() as stack:
        # A socket's path is short.
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kubebox-")))
        address, log = state / "containerd.sock", state / "log"
        configuration = state / "containerd.toml"
        configuration.write_text(_CONFIGURATION.format(root=root, state=state / "state", socket=address))
        with log.open("wb") as output:
            process = subprocess.Popen(
                # Where we are killed, it goes as well: it is in no group that `down` ends.
                ["setpriv", "--pdeathsig", "KILL", "containerd", "-c", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            waiting.until(
                lambda: answers(address), what="a containerd answers", seconds=ANSWER_SECONDS, watched={log: process}
            )
            yield address
        finally:
            process.terminate()
            process.wait()


def answers(address: Path) -> bool:
    """Whether a containerd listens there."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(address))
    except OSError:
        return False
    return True


def load(address: Path, archive: Path) -> None:
    """Import an image archive, OCI's or Docker's, into the containerd that listens there."""
    command = ["ctr", "--address", str(address), "--namespace", "k8s.io", "image", "import", str(archive)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode and result.stderr.rstrip().endswith("does not exist: not found"):
        # containerd collected a layer's parent between two layers, as nothing referred to it yet.
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ClusterError(f"containerd at {address} cannot import {archive}: {result.stderr.strip()}")
