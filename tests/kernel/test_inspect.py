"""``probefleet inspect``: relocations of a file, and the map ids that a loader put in their places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from probefleet_agent.kernel import maps, syscall
from probefleet_cli import main

from tests.kernel import policies
from tests.kernel.support import Loaded, compile_object, needs

# A loop that is unrolled: each turn is 40 bytes, and the map stands 8 bytes into the first.
LOOP = """
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 4); __uint(key_size, 4); __uint(value_size, 4); }
ways SEC(".maps");
SEC("raw_tp/sys_enter")
int try_each(void *ctx)
{
#pragma unroll
	for (int way = 0; way < 4; way++)
		bpf_tail_call(ctx, &ways, way);
	return 0;
}
"""


def inspected(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(main.machine, ["inspect", *map(str, arguments), "--output", "json"])
    assert done.exit_code == 0, (done.output, done.exception)
    found: dict[str, Any] = json.loads(done.output)
    return found


def test_a_loop_of_four_tail_calls_has_four_relocations(tmp_path: Path) -> None:
    path = tmp_path / "loop.o"
    path.write_bytes(compile_object(LOOP))
    found = inspected(path)
    places = [each["offset"] for each in found["relocations"] if each["map"] == "ways"]
    assert places == ["0x08", "0x30", "0x58", "0x80"]
    assert {each["program"] for each in found["relocations"]} == {"try_each"}
    (ways,) = [each for each in found["maps"] if each["name"] == "ways"]
    assert (ways["type"], ways["entries"]) == ("prog-array", 4)
    assert found["btfTypes"] > 0 and found["licence"] == "GPL"


def test_a_loaded_program_has_the_maps_id_in_each_of_these_places() -> None:
    with Loaded(LOOP) as loaded:
        program, array = syscall.program_info(loaded.programs["try_each"]), maps.info(loaded.maps["ways"])
        (found,) = inspected("--program-id", program.id)["programs"]
    assert found["name"] == "try_each" and found["id"] == program.id
    assert [each["mapId"] for each in found["references"] if each["map"] == "ways"] == [array.id] * 4
    assert [each["id"] for each in found["maps"]] == list(program.map_ids)


def test_an_instance_is_found_by_the_beginning_of_its_digest() -> None:
    source = """
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
n SEC(".maps");
ON_CALL { u32 key = 0; probefleet_add(&n, &key, 1); return 0; }
"""
    with policies.run(policies.c_policy(source)):
        (folder,) = policies.folder().glob("probefleet/instances/*")
        (found,) = inspected("--instance", folder.name[:12])["programs"]
        assert found["name"] == "on_call" and "n" in [each["map"] for each in found["references"]]


def test_status_check_and_inspect_say_how_many_instructions_the_verifier_went_through() -> None:
    """Two programs without a branch: as many as they have, `r0 = 0` and `exit` among them."""

    def verified_instructions() -> bool:
        with Loaded('SEC("raw_tp") int it(void *ctx) { return 0; }') as loaded:
            return syscall.program_info(loaded.programs["it"]).verified_instructions > 0

    needs(verified_instructions)  # Linux 5.16
    source = """
u64 unused = 0;
SEC("raw_tp/sys_enter") int two(void *ctx) { return 0; }
SEC("raw_tp/sys_exit") int many(void *ctx) { TWENTY_THREE return 0; }
""".replace("TWENTY_THREE", 'asm volatile("r1 = 7" ::: "r1");' * 23)
    outputs = [{"name": "unused", "from": {"map": ".bss", "value": "unused"}, "counter": {}}]
    with policies.run(policies.c_policy(source, outputs=outputs)) as run:
        (status,) = run.measured.statuses()
        (folder,) = policies.folder().glob("probefleet/instances/*")
        found = {
            each["name"]: each["verifiedInstructions"] for each in inspected("--instance", folder.name)["programs"]
        }
    assert found == {"two": 2, "many": 25}
    assert status.verified_instructions == 27


def test_a_table_for_people(tmp_path: Path) -> None:
    path = tmp_path / "loop.o"
    path.write_bytes(compile_object(LOOP))
    done = CliRunner().invoke(main.machine, ["inspect", str(path)])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0].startswith(f"{path}: licence GPL, BTF with ")
    assert 'try_each  SEC("raw_tp/sys_enter")' in done.output
    assert any(line.split() == ["0x58", "raw_tp/sys_enter", "try_each", "ways"] for line in lines)


@pytest.mark.parametrize("data", [b"", b"\x7fELF" + bytes(60), b"no object"])
def test_what_is_no_object_is_said_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.o"
    path.write_bytes(data)
    done = main.invoke(main.machine, ["inspect", str(path)], program="probefleet")
    assert done == 2
