"""The doctor looks at everything, advises, and never falls ill itself."""

from __future__ import annotations

import sys

import pytest
from probefleet_agent import doctor
from probefleet_agent.kernel import features


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


def test_bcc_needs_its_library_and_no_python_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    monkeypatch.setattr("ctypes.util.find_library", {"bcc": "libbcc.so.0"}.get)
    by_name = {check.name: check for check in doctor.checks()}
    assert by_name["BCC"].ok and "libbcc.so.0" in by_name["BCC"].detail
    monkeypatch.setattr("ctypes.util.find_library", {}.get)
    by_name = {check.name: check for check in doctor.checks()}
    assert by_name["BCC"].advice == "apt install libbpfcc"
