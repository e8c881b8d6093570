"""docs/from-bcc.md has a place for every command of Debian's bpfcc-tools, and what it names is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from probefleet_core import errors, policy

from tests.foreign import table

ROOT = Path(__file__).resolve().parents[2]
# dpkg -L bpfcc-tools of bookworm (0.26.0): /usr/sbin/*-bpfcc, without the suffix.
NAMES = """
argdist bashreadline bindsnoop biolatency biolatpcts biopattern biosnoop biotop bitesize bpflist btrfsdist
btrfsslower cachestat cachetop capable cobjnew compactsnoop cpudist cpuunclaimed criticalstat dbslower dbstat
dcsnoop dcstat deadlock dirtop drsnoop execsnoop exitsnoop ext4dist ext4slower filegone filelife fileslower
filetop funccount funcinterval funclatency funcslower gethostlatency hardirqs inject javacalls javaflow javagc
javaobjnew javastat javathreads killsnoop klockstat kvmexit llcstat mdflush memleak mountsnoop mysqld_qslower
netqtop nfsdist nfsslower nodegc nodestat offcputime offwaketime oomkill opensnoop perlcalls perlflow perlstat
phpcalls phpflow phpstat pidpersec ppchcalls profile pythoncalls pythonflow pythongc pythonstat readahead
reset-trace rubycalls rubyflow rubygc rubyobjnew rubystat runqlat runqlen runqslower shmsnoop slabratetop
sofdsnoop softirqs solisten sslsniff stackcount statsnoop syncsnoop syscount tclcalls tclflow tclobjnew tclstat
tcpaccept tcpcong tcpconnect tcpconnlat tcpdrop tcplife tcpretrans tcprtt tcpstates tcpsubnet tcpsynbl tcptop
tcptracer threadsnoop tplist trace ttysnoop vfscount vfsstat virtiostat wakeuptime xfsdist xfsslower zfsdist
zfsslower
"""
COMMANDS = NAMES.split()
ROW = re.compile(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \|$", re.MULTILINE)
TABLE = {name: (instead, how) for name, instead, how in ROW.findall((ROOT / "docs/from-bcc.md").read_text())}


def test_every_command_of_the_package_has_its_row() -> None:
    assert sorted(TABLE) == sorted(COMMANDS)


def test_the_list_is_the_packages_own() -> None:
    done = subprocess.run(["dpkg", "-L", "bpfcc-tools"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("bpfcc-tools is not installed; `make test-packages` does that")
    assert sorted(COMMANDS) == sorted(re.findall(r"^/usr/sbin/(.+)-bpfcc$", done.stdout, re.MULTILINE))


def test_of_both_kinds_at_least_25_run_unchanged() -> None:
    tried = table.read((ROOT / "docs/foreign.md").read_text())
    for kind in ("bcc", "bpftrace"):
        assert len([each for each in tried if each.kind == kind and each.state == "works"]) >= 25


def test_every_row_says_how_or_why_not() -> None:
    for name, (instead, how) in TABLE.items():
        assert re.match(r"\[catalog |\[\w[\w-]*\.yaml\]|its C, unchanged|its C|not yet|no\b|nothing", instead), name
        assert len(how) > 8, name


def test_what_was_tried_does_not_contradict_it() -> None:
    """`docs/foreign.md` is what a run on another kernel found."""
    tried = {each.name: each for each in table.read((ROOT / "docs/foreign.md").read_text()) if each.kind == "bcc"}
    assert sorted(tried) == sorted(COMMANDS)
    for name, (instead, how) in TABLE.items():
        if instead == "its C, unchanged":
            assert tried[name].state in ("works", "loads", "late"), f"{name}: {tried[name].words}"
        if instead.startswith(("no", "not yet")):
            assert tried[name].state != "works", f"{name} works: {how}"


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\]\((\.\./[^)]+)\)", (ROOT / "docs/from-bcc.md").read_text())))
)
def test_what_it_names_is_there_and_is_accepted(path: str) -> None:
    found = (ROOT / "docs" / path).resolve()
    assert found.exists()
    if found.suffix != ".yaml":
        return
    for document in yaml.safe_load_all(found.read_text()):
        if document["kind"] == "ProbePolicy":
            try:
                policy.parse_policy(document)
            except errors.Refused as refusal:
                raise AssertionError(f"{path}: {refusal}") from refusal
