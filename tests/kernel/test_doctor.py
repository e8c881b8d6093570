"""The doctor looks at everything, advises, and never falls ill itself."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from probefleet_agent import doctor
from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import features
from probefleet_cli import main


def test_the_doctor_looks_at_everything_and_advises() -> None:
    found = doctor.checks()
    by_name = {check.name: check for check in found}
    assert by_name["bpffs"].ok and by_name["libbpf"].ok and by_name["types (BTF)"].ok
    assert by_name["kprobes"].ok == features.kprobes()
    assert all(check.ok or check.advice for check in found), "what is not ok says what to do"
    assert doctor.worst(found) in (doctor.Level.OK, doctor.Level.WARN)


def test_the_doctor_survives_a_check_that_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[doctor.Level, str, str]:
        raise OSError("no such thing")

    monkeypatch.setitem(doctor._CHECKS, "kernel", broken)
    assert doctor.checks()[0] == doctor.Check("kernel", doctor.Level.FAIL, "no such thing")
    assert doctor.worst(doctor.checks()) is doctor.Level.FAIL


ADVICE = {
    "bpffs": ("mounts.is_bpffs", lambda path: False, "mount -t bpf bpf /sys/fs/bpf"),
    "tracefs": ("mounts.tracefs", lambda: None, "mount -t tracefs tracefs /sys/kernel/tracing"),
    "types (BTF)": ("btf_kernel.available", lambda: False, "CONFIG_DEBUG_INFO_BTF=y"),
    "libbpf": ("libbpf.version", lambda: (0, 8), "Install libbpf 1.0 or later"),
    "statistics": ("features.bpf_stats", lambda: False, "Give CAP_SYS_ADMIN"),
    "kprobes": ("features.kprobes", lambda: False, "CONFIG_KPROBES=y"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_what_is_missing_has_its_advice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, instead, words = ADVICE[name]
    monkeypatch.setattr(f"probefleet_agent.doctor.{what}", instead)
    by_name = {check.name: check for check in doctor.checks()}
    assert not by_name[name].ok
    assert words in by_name[name].advice


FILES = {
    "JIT": ("/proc/sys/net/core/bpf_jit_enable", "0\n", doctor.Level.WARN, "sysctl net.core.bpf_jit_enable=1"),
    "lockdown": (
        "/sys/kernel/security/lockdown", "none integrity [confidentiality]\n", doctor.Level.FAIL,
        "Boot without lockdown=confidentiality",
    ),
    "capabilities": ("/proc/self/status", "CapEff:\t0000000000000000\n", doctor.Level.FAIL, "Run as root"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_the_kernel_says_of_itself_is_judged(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place, text, level, words = FILES[name]
    (tmp_path / "file").write_text(text)
    monkeypatch.setattr(doctor, "Path", lambda path: tmp_path / "file" if path == place else Path(path))
    found = {check.name: check for check in doctor.checks()}[name]
    assert (found.level, words in found.advice) == (level, True), found


def test_perf_events_that_are_refused_are_said_with_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise KernelError(errno.EACCES, "perf_event_open")

    monkeypatch.setattr(doctor.syscall, "perf_event_open", refuse)
    found = {check.name: check for check in doctor.checks()}["perf events"]
    assert found.level is doctor.Level.FAIL
    assert "perf_event_paranoid is" in found.detail and "sysctl kernel.perf_event_paranoid" in found.advice


def test_the_command_ends_with_1_where_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = doctor.Check("JIT", doctor.Level.FAIL, "off", "switch it on")
    monkeypatch.setattr(doctor, "checks", lambda: [bad])
    said = CliRunner().invoke(main.machine, ["doctor"])
    assert said.exit_code == 1
    assert "switch it on" in said.output
    monkeypatch.setattr(doctor, "checks", lambda: [doctor.Check("JIT", doctor.Level.WARN, "off", "switch it on")])
    assert CliRunner().invoke(main.machine, ["doctor"]).exit_code == 0


def test_bcc_needs_its_library_and_no_python_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    monkeypatch.setattr("ctypes.util.find_library", {"bcc": "libbcc.so.0"}.get)
    by_name = {check.name: check for check in doctor.checks()}
    assert by_name["BCC"].ok and "libbcc.so.0" in by_name["BCC"].detail
    monkeypatch.setattr("ctypes.util.find_library", {}.get)
    by_name = {check.name: check for check in doctor.checks()}
    assert by_name["BCC"].advice == "apt install libbpfcc"
