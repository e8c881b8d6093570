"""The folder that lets BCC compile without kernel headers: types from the node's BTF, macros and numbers from here.

``tree(btf_bytes)`` makes it once for a kernel (0.7 s) and returns its path; BCC takes it as ``BCC_KERNEL_SOURCE``. It
lies under the digest of the BTF and of this package, is built beside its place and renamed, so that a reader sees a
whole tree or none, and two agents may make it at once. Nothing in it is secret: BCC's child reads it as nobody.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

from probefleet_wire import btf_c
from probefleet_wire.btf import Btf

ROOT = Path("/run/probefleet/headers")
HERE = Path(__file__).parent
# The files that BCC's own helpers.h includes. Others that a program includes are made beside it (see ``bcc``): every
# one is vmlinux.h under another name.
WRAPPERS = (
    *("linux/types.h", "linux/bpf.h", "linux/bpf_common.h", "linux/log2.h", "linux/sched.h", "linux/fs.h"),
    *("linux/perf_event.h", "linux/compiler.h", "linux/compiler_types.h", "linux/compiler-version.h", "net/sock.h"),
    *("uapi/linux/bpf.h", "uapi/linux/bpf_common.h", "uapi/linux/if_ether.h", "uapi/linux/if_packet.h"),
    "uapi/linux/ptrace.h",
)
WRAPPER = '#pragma once\n#include "vmlinux.h"\n'
FILES = {
    "linux/kconfig.h": "#pragma once\n#define CONFIG_BPF_SYSCALL 1\n#define CONFIG_64BIT 1\n{architecture}",
    "linux/version.h": "#pragma once\n#define LINUX_VERSION_CODE {version}\n"
    "#define KERNEL_VERSION(a,b,c) (((a)<<16)+((b)<<8)+((c)>255?255:(c)))\n",
    "asm/page.h": f"#pragma once\n#define PAGE_SIZE {os.sysconf('SC_PAGESIZE')}\n",
}
_ARCHITECTURES = {
    "x86_64": "#define CONFIG_X86_64 1\n",
    "aarch64": "#define CONFIG_ARM64 1\n",
}


def tree(btf_bytes: bytes, *, root: Path = ROOT, release: str | None = None) -> Path:
    """The folder for the kernel with this BTF, made if it is not there yet. Raises ``BtfError`` and OSError."""
    release = release or os.uname().release
    own = b"".join(path.read_bytes() for path in sorted(HERE.iterdir()) if path.is_file())
    emitter = Path(btf_c.__file__).read_bytes()
    digest = hashlib.sha256(b"\0".join([btf_bytes, own, emitter, release.encode()])).hexdigest()[:32]
    made = root / digest
    if made.is_dir():
        return made
    root.mkdir(parents=True, exist_ok=True, mode=0o755)
    building = Path(tempfile.mkdtemp(prefix="new-", dir=root))
    try:
        _fill(building / "include", Btf.parse(btf_bytes), release)
        for path in (building, *building.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            building.rename(made)
        except OSError:
            if not made.is_dir():  # another one was quicker, or it is a real error
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return made


def _fill(include: Path, btf: Btf, release: str) -> None:
    words = {"version": version_code(release), "architecture": _ARCHITECTURES.get(platform.machine(), "")}
    files = dict.fromkeys(WRAPPERS, WRAPPER)
    files |= {name: text.format(**words) if "{" in text else text for name, text in FILES.items()}
    known = btf_c.enumerators(btf)
    supplied = "".join(f"#define {name} {value}\n" for name, value in abi_numbers() if name not in known)
    files["vmlinux.h"] = btf_c.emit(btf).removesuffix(btf_c.EPILOGUE) + supplied + _macros(known) + btf_c.EPILOGUE
    files |= {name: (HERE / name).read_text() for name in ("probefleet_bcc.h", "probefleet_bcc_print.h")}
    for name, text in files.items():
        path = include / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _macros(known: frozenset[str]) -> str:
    """macros.h without what this kernel's BTF has as an enumerator: a macro of that name would break its users."""
    lines = (HERE / "macros.h").read_text().replace("#pragma once\n", "").splitlines(keepends=True)
    return "".join(line for line in lines if not (line.startswith("#define ") and _defined(line) in known))


def _defined(line: str) -> str:
    return line.split()[1].split("(")[0]


def abi_numbers() -> list[tuple[str, int]]:
    """Helpers, map types and flags by name, from abi.txt."""
    rows = [line.split() for line in (HERE / "abi.txt").read_text().splitlines() if not line.startswith("#")]
    return [(name, int(value)) for name, value in rows]


def version_code(release: str) -> int:
    """``6.1.0-49-amd64`` as KERNEL_VERSION(6, 1, 0)."""
    parts = [int(digits) for digits in release.split("-")[0].split(".")[:3] if digits.isdigit()]
    major, minor, patch = [*parts, 0, 0, 0][:3]
    return (major << 16) + (minor << 8) + min(patch, 255)
