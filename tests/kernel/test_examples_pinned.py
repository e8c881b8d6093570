"""The examples that find a map which another loader made: one kernel map id, descriptors of everybody's own.

PIN_GLOBAL_NS is iproute2's. Here tc itself pins the map, from an object with `struct bpf_elf_map` (translated, since
libbpf 1 refuses it in tc as well) and from one with BTF's form, and a policy reads it; a ProbeMap does the same for two
policies.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from probefleet_agent.kernel import interfaces, maps, mounts, syscall
from probefleet_core import legacy_maps
from probefleet_wire import clang
from probefleet_wire.bpf_object import BpfObject

from tests.kernel import examples_runner, network
from tests.kernel.network import Wire, ip

# An emulated machine takes minutes for what starts a command.
pytestmark = pytest.mark.timeout(400)
INCLUDE = Path(__file__).parents[2] / "bpf/include"
PIN = Path("/sys/fs/bpf/tc/globals/endpoints")
STRANGER = "203.0.113.9"
BTF_FORM = """
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __be32);
	__type(value, __u64);
} endpoints SEC(".maps");
"""


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A node of its own, whose eth0 leads to somebody with a second address."""
    with network.namespace() as here, interfaces.entered(here), network.wire("eth0", "far0") as made:
        ip("route", "add", "203.0.113.0/24", "dev", "eth0")
        with interfaces.entered(made.there):
            ip("addr", "add", f"{STRANGER}/32", "dev", "far0")
        yield made


def send_to_stranger(wire: Wire, times: int) -> None:
    """Datagrams from here to the address that has never sent; each is received before the next one goes."""
    with interfaces.entered(wire.there):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        receiver.bind((STRANGER, network.PORT))
        receiver.settimeout(10)
        for _ in range(times):
            sender.sendto(b"x", (STRANGER, network.PORT))
            receiver.recv(1)


def writer_source() -> str:
    """The first policy's program: its map is iproute2's."""
    documents = yaml.safe_load_all((examples_runner.EXAMPLES / "global-map.yaml").read_text())
    found = next(each for each in documents if each["metadata"]["name"] == "endpoints-seen")
    return str(found["spec"]["program"]["c"]["source"])


def writer_object(form: str) -> bytes:
    """The same program as tc is given it."""
    source = writer_source()
    if form == "BTF":
        source = re.sub(r"struct bpf_elf_map \{.*?\};\n\n.*?\n\};\n", BTF_FORM, source, flags=re.DOTALL)
    data = clang.compile_core(source, name="endpoints.c", include_dirs=[INCLUDE]).object
    assert ("bpf_elf_map" in source) == (form != "BTF") == (legacy_maps.translate(data) != data)
    return legacy_maps.translate(data)


@pytest.fixture(params=["bpf_elf_map", "BTF"])
def of_tc(request: pytest.FixtureRequest, tmp_path: Path, wire: Wire) -> Iterator[int]:
    """tc has loaded its program onto eth0 and pinned the map; the map's id."""
    mounts.mount_bpffs()
    assert not PIN.exists(), f"{PIN} belongs to somebody else"
    file = tmp_path / "endpoints.o"
    file.write_bytes(writer_object(request.param))
    words = f"filter add dev eth0 ingress bpf direct-action object-file {file} section tc"
    subprocess.run(["tc", "qdisc", "add", "dev", "eth0", "clsact"], check=True, capture_output=True)
    try:
        subprocess.run(["tc", *words.split()], check=True, capture_output=True)
        with syscall.obj_get(str(PIN), read_only=True) as fd:
            yield maps.info(fd).id
    finally:
        PIN.unlink(missing_ok=True)


def held(pid: int, map_id: int) -> set[int]:
    """A process's descriptors of a map, as the kernel lists them."""
    found = set()
    for each in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile: the listing's own
            facts = dict(line.split(":", 1) for line in each.read_text().splitlines() if ":" in line)
            if "map_type" in facts and int(facts["map_id"]) == map_id:
                found.add(int(each.name))
    return found


def maps_of_programs(run: examples_runner.Run) -> dict[str, tuple[int, ...]]:
    """Program → the ids of the maps that it uses, by the kernel's word."""
    found = {}
    for path in (run.pins / "instances").glob("[0-9a-f]*/prog_*"):
        with syscall.obj_get(str(path)) as program:
            found[path.name.removeprefix("prog_")] = tuple(syscall.program_info(program).map_ids)
    return found


@pytest.mark.shows("example/pinned-by-tc")
def test_a_map_that_tc_made_is_found_by_a_policy(wire: Wire, of_tc: int) -> None:
    with examples_runner.running("pinned-by-tc.yaml", links=1) as run:
        assert of_tc in maps_of_programs(run)["answered"], "the map that tc made, not another of that name"
        assert held(run.process.pid, of_tc), "a descriptor of its own"
        assert wire.send_here(997) == 997
        assert wire.send_there(23) == 23
        send_to_stranger(wire, 31)
    # What tc's program counted, and what ours found in it.
    assert run.rows("endpoints-of-tc", "packets") == {("192.0.2.2",): 997}
    assert run.rows("endpoints-of-tc", "answers") == {("true",): 23, ("false",): 31}
    assert PIN.exists(), "it is tc's: it stays"


def test_a_map_is_found_under_its_id_by_a_descriptor_of_each_ones_own(wire: Wire, of_tc: int) -> None:
    assert wire.send_here(997) == 997
    with syscall.obj_get(str(PIN)) as one, syscall.obj_get(str(PIN)) as other:
        assert one.fileno() != other.fileno() and {one.fileno(), other.fileno()} <= held(os.getpid(), of_tc)
        assert maps.info(one).id == maps.info(other).id == of_tc
    listed = subprocess.run(["bpftool", "map", "show", "pinned", str(PIN)], capture_output=True, text=True, check=True)
    assert listed.stdout.startswith(f"{of_tc}: hash  name endpoints")


@pytest.mark.shows("example/global-map")
def test_two_policies_share_the_map_that_the_first_one_made(wire: Wire) -> None:
    with examples_runner.running("global-map.yaml", links=2) as run:
        (pin,) = (run.pins / "maps").glob("*/map_*")
        with syscall.obj_get(str(pin)) as fd:
            map_id = maps.info(fd).id
        used = maps_of_programs(run)
        assert map_id in used["seen"] and map_id in used["answered"]
        assert len(held(run.process.pid, map_id)) >= 2, "a descriptor for each of its users"
        assert wire.send_here(997) == 997
        assert wire.send_there(23) == 23
        send_to_stranger(wire, 31)
    assert run.rows("endpoints-seen", "packets") == {("192.0.2.2",): 997}
    assert run.rows("endpoints-answered", "answers") == {("true",): 23, ("false",): 31}
    assert not PIN.exists(), "PIN_GLOBAL_NS pins nothing by name"


def test_pinning_of_iproute2s_definition_is_read() -> None:
    (found,) = BpfObject.parse(writer_object("bpf_elf_map")).maps
    assert (found.name, found.pinning, found.numa_node, found.max_entries) == ("endpoints", 1, 0, 4096)
