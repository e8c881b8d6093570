"""Debian's kernels, downloaded and unpacked so that `vm` can boot them: suite name in, `Kernel` out.

`vm fetch` calls `fetch()`, `vm run` calls `find()`. Each suite becomes one folder of
`${XDG_CACHE_HOME:-~/.cache}/probefleet/kernels/`:

    bookworm/kernel.json     what was fetched: package versions and SHA-256
    bookworm/boot/vmlinuz-…  the kernel; its lib/modules/ is mounted in the guest, so modprobe works there
    bookworm/initramfs.gz    busybox, the modules that reach the host's files, and vm_init
    bookworm/facts-…/        what that kernel says it has, once `tests/foreign` has asked

A folder is built under `new-…` and renamed, so what has a name is whole. Nothing is installed: apt reads a
sources list, package lists and an (empty) dpkg status of its own, and checks Debian's signatures as always.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUITES = {"bullseye": "5.10", "bookworm": "6.1", "bookworm-backports": "6.12", "sid": "the newest"}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BUSYBOX = Path("/bin/busybox")

# What a guest needs before it sees any file of the host: 9p over virtio, the layer over it, the ports that
# carry stdout and stderr, and a network card.
BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console", "virtio_net")

Say = Callable[[str], None]


class VmError(Exception):
    """A kernel could not be fetched, found or booted; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Package:
    """One Debian package that a kernel was unpacked from."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel. `release` is what `uname -r` prints in the guest, `version` the package's."""

    suite: str
    release: str
    version: str
    fetched_at: str
    packages: tuple[Package, ...]
    folder: Path

    @property
    def vmlinuz(self) -> Path:
        """The compressed kernel image."""
        return self.folder / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        """The folder whose only entry is the release's modules."""
        return self.folder / "lib" / "modules"

    @property
    def initramfs(self) -> Path:
        """The first root file system."""
        return self.folder / "initramfs.gz"


def cache() -> Path:
    """Where kernels are unpacked: XDG_CACHE_HOME's probefleet/kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "probefleet" / "kernels"


def required_packages() -> tuple[str, ...]:
    """The Debian packages that fetching and booting need."""
    lines = (HERE / "packages.txt").read_text().splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


def require(*tools: str) -> None:
    """Refuse early, with the command that helps, when a tool is not installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if missing := [tool for tool in tools if not shutil.which(tool, path=path)]:
        raise VmError(f"not installed: {', '.join(missing)}; run: apt-get install -y {' '.join(required_packages())}")


def unpacked() -> Iterator[Kernel]:
    """Every kernel that was fetched, oldest kernel first."""
    kernels = [_read(path) for path in cache().glob("[a-z]*/kernel.json") if not path.parent.name.startswith("new-")]
    yield from sorted(kernels, key=lambda kernel: _numbers(kernel.release))


def find(name: str) -> Kernel:
    """The kernel that `name` means: a suite (`bookworm`) or the start of a release (`6.1`)."""
    kernels = list(unpacked())
    for kernel in reversed(kernels):
        if name == kernel.suite or f"{kernel.release}.".startswith((f"{name}.", f"{name}-")):
            return kernel
    there = ", ".join(f"{kernel.suite} ({kernel.release})" for kernel in kernels) or "none"
    suite = next((suite for suite, release in SUITES.items() if name in (suite, release)), "|".join(SUITES))
    raise VmError(f"no kernel {name!r} is unpacked (there: {there}); run: tests/kernel/vm fetch {suite}")


def fetch(suite: str, *, refresh: bool = False, say: Say) -> Kernel:
    """Download and unpack the kernel that `linux-image-amd64` of a suite names; one that is there is kept."""
    if suite not in SUITES:
        known = ", ".join(f"{name} ({kernel})" for name, kernel in SUITES.items())
        raise VmError(f"unknown suite {suite!r}; Debian suites with a kernel to test on: {known}")
    folder = cache() / suite
    if not refresh and (folder / "kernel.json").exists():
        kernel = _read(folder / "kernel.json")
        refresh_initramfs(kernel)
        say(f"{suite}: Linux {kernel.release} ({kernel.version}), kept; --refresh looks for a newer one")
        return kernel
    require("apt-get", "dpkg-deb", "depmod", "modprobe", "cpio", "busybox", "qemu-system-x86_64")
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=cache()) as work:
        new = Path(work) / suite
        packages = _download(suite, Path(work), say)
        say(f"{suite}: unpacking")
        for deb in sorted(Path(work).glob("*.deb")):
            _call("dpkg-deb", "--extract", str(deb), str(new))
        if not (new / "lib" / "modules").exists():  # newer suites ship /usr/lib only
            (new / "lib").symlink_to("usr/lib")
        (release,) = (path.name for path in (new / "lib" / "modules").iterdir())
        kernel = Kernel(
            suite=suite,
            release=release,
            version=packages[0].version,
            fetched_at=datetime.now(UTC).isoformat(timespec="seconds"),
            packages=packages,
            folder=new,
        )
        vmlinuz = next(path for path in new.rglob("vmlinuz*") if path.is_file() and not path.is_symlink())
        if vmlinuz != kernel.vmlinuz:  # sid keeps it beside the modules
            kernel.vmlinuz.parent.mkdir(parents=True, exist_ok=True)
            vmlinuz.rename(kernel.vmlinuz)
        _call("depmod", "--basedir", str(new), release)
        refresh_initramfs(kernel)
        facts = {key: value for key, value in asdict(kernel).items() if key != "folder"}
        (new / "kernel.json").write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    say(f"{suite}: Linux {release} ({kernel.version}), ready")
    return _read(folder / "kernel.json")


def mirror() -> str:
    """The archive that this machine's own apt sources use for its own release."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line).get(
        "VERSION_CODENAME", ""
    )
    targets = _output("apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Identifier: Packages")
    for line in targets.splitlines():
        suite, uri = line.split(" ", 1)
        if suite == release.strip('"') and "-security" not in uri:
            return uri.rstrip("/")
    raise VmError(
        f"apt has no source for {release or 'this release'}: kernels are fetched from where its packages come"
    )


def _download(suite: str, work: Path, say: Say) -> tuple[Package, ...]:
    """Download a suite's kernel image and the packages it is split into; the image comes first."""
    (work / "lists" / "partial").mkdir(parents=True)
    (work / "cache" / "archives" / "partial").mkdir(parents=True)
    (work / "status").touch()  # the machine's own kernel packages must not be mistaken for the suite's
    (work / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
    options = (
        "-qq",
        f"-oDir::Etc::SourceList={work}/sources.list",
        "-oDir::Etc::SourceParts=/dev/null",
        f"-oDir::State::Lists={work}/lists",
        f"-oDir::State::Status={work}/status",
        f"-oDir::Cache={work}/cache",
        "-oAPT::Sandbox::User=root",
        "-oAcquire::Retries=3",
        "-oAcquire::Languages=none",
    )
    say(f"{suite}: reading {mirror()}")
    _call("apt-get", *options, "update")
    # The metapackage is the suite's own word for which of its kernels is the current one.
    (image,) = _depends(options, "linux-image-amd64", r"linux-image-\d")
    names = [image, *_depends(options, image, r"linux-(base|binary|modules)-\d")]
    say(f"{suite}: downloading {', '.join(names)}")
    _call("apt-get", *options, "download", *names, cwd=work)
    packages = []
    for name in names:
        (deb,) = work.glob(f"{name}_*.deb")
        version = _output("dpkg-deb", "--field", str(deb), "Version").strip()
        packages.append(Package(name, version, hashlib.sha256(deb.read_bytes()).hexdigest()))
    return tuple(packages)


def _depends(options: tuple[str, ...], package: str, pattern: str) -> list[str]:
    """The packages that `package` depends on whose names match."""
    lines = _output("apt-cache", *options, "depends", "--important", package).splitlines()
    found = (line.split()[-1] for line in lines if "Depends:" in line)
    return sorted({name for name in found if re.match(pattern, name)})


def refresh_initramfs(kernel: Kernel) -> None:
    """Pack the first root file system, unless it is newer than vm_init already."""
    init = HERE / "vm_init"
    if kernel.initramfs.exists() and kernel.initramfs.stat().st_mtime > init.stat().st_mtime:
        return
    with tempfile.TemporaryDirectory(prefix="probefleet-initramfs-") as temporary:
        root = Path(temporary)
        for folder in ("bin", "proc", "sys", "dev", "lower", "upper", "new", "modules"):
            (root / folder).mkdir()
        shutil.copy(BUSYBOX, root / "bin" / "busybox")
        shutil.copy(init, root / "init")
        order: list[str] = []
        for module in BOOT_MODULES:
            shown = _output(
                "modprobe",
                "--dirname",
                str(kernel.folder),
                "--set-version",
                kernel.release,
                "--show-depends",
                module,
            )
            files = [Path(line.split()[1]) for line in shown.splitlines() if line.startswith("insmod ")]
            for file in files:
                content = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
                name = file.name.removesuffix(".xz")
                (root / "modules" / name).write_bytes(content)
                if name not in order:
                    order.append(name)
        (root / "modules" / "order").write_text("".join(f"{name}\n" for name in order))
        entries = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
        archive = subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet"],
            cwd=root,
            input=entries.encode(),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    new = kernel.folder / "initramfs.new"
    new.write_bytes(gzip.compress(archive, compresslevel=1))
    new.rename(kernel.initramfs)


def _read(facts: Path) -> Kernel:
    read = json.loads(facts.read_text())
    packages = tuple(Package(**package) for package in read.pop("packages"))
    return Kernel(**read, packages=packages, folder=facts.parent)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release))


def _output(*command: str) -> str:
    """A command's output; its own complaint becomes the error."""
    # modprobe and depmod live where a user's PATH may not look.
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise VmError(f"`{' '.join(command)}` failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _call(*command: str, cwd: Path | None = None) -> None:
    if cwd is None:
        _output(*command)
        return
    _output("env", f"--chdir={cwd}", *command)
