"""Pins: an instance is there as a whole or not at all; what a dead agent left half done is swept away."""

from __future__ import annotations

import errno

import pytest
from probefleet_agent.errors import KernelError, ProbefleetError
from probefleet_agent.kernel import maps, pins, syscall
from probefleet_agent.kernel.uapi import MapType

from tests.kernel.support import wait_until


def new_map() -> syscall.Fd:
    return syscall.map_create(MapType.ARRAY, key_size=4, value_size=8, max_entries=1, name="test")


def build(root: pins.Root, digest: str, manifest: bytes = b"what it is") -> int:
    """An instance of one map; its kernel id."""
    with new_map() as fd, root.staging(digest) as folder:
        folder.pin_map("counts", fd)
        folder.write_manifest(manifest)
        return syscall.map_info(fd).id


def test_an_instance_is_adopted_as_it_was_pinned(root: pins.Root) -> None:
    number = build(root, "d1", bytes(range(256)) * 997)
    assert root.list_instances() == ["d1"]
    with root.open_instance("d1") as found:
        assert found.manifest == bytes(range(256)) * 997
        assert maps.info(found.maps["counts"]).id == number
    assert root.read_manifest("d1") == bytes(range(256)) * 997


def test_what_fails_while_it_is_built_leaves_nothing(root: pins.Root) -> None:
    with pytest.raises(RuntimeError, match="verifier"), new_map() as fd, root.staging("d1") as folder:
        folder.pin_map("counts", fd)
        raise RuntimeError("verifier")
    assert root.list_instances() == []
    assert list(root.instances.iterdir()) == []


def test_an_instance_is_never_built_over_another(root: pins.Root) -> None:
    build(root, "d1", b"first")
    with pytest.raises(KernelError) as caught, root.staging("d1"):
        pass
    assert caught.value.errno == errno.EEXIST
    assert root.read_manifest("d1") == b"first"


def test_half_built_and_half_removed_folders_are_invisible_and_swept(root: pins.Root) -> None:
    build(root, "d1")
    build(root, "d2")
    (root.instances / "d2").rename(root.instances / "gone-d2")
    (root.instances / "new-d3").mkdir()
    assert root.list_instances() == ["d1"]
    assert sorted(root.sweep()) == ["gone-d2", "new-d3"]
    assert [path.name for path in root.instances.iterdir()] == ["d1"]


def test_removing_takes_everything_and_tells_whether_there_was_something(root: pins.Root) -> None:
    number = build(root, "d1")
    assert root.remove("d1")
    assert not root.remove("d1")
    assert list(root.instances.iterdir()) == []
    with pytest.raises(KernelError) as caught:
        root.open_instance("d1")
    assert caught.value.errno == errno.ENOENT
    wait_until(lambda: number not in syscall.ids("map"))  # the kernel frees maps after RCU


def test_a_manifest_is_replaced_at_once(root: pins.Root) -> None:
    build(root, "d1", b"old")
    root.write_manifest("d1", b"new and longer")
    assert root.read_manifest("d1") == b"new and longer"
    assert sorted(path.name for path in (root.instances / "d1").iterdir()) == ["manifest", "map_counts"]


def test_a_damaged_or_foreign_manifest_is_refused(root: pins.Root) -> None:
    build(root, "d1")
    path = root.instances / "d1" / "manifest"
    with syscall.obj_get(str(path)) as fd:
        size = syscall.map_info(fd).value_size
        syscall.map_update(fd, bytes(4), bytes(size))
    with pytest.raises(ProbefleetError, match="damaged"):
        root.read_manifest("d1")
    path.unlink()
    with new_map() as fd:
        syscall.obj_pin(fd, str(path))
    with pytest.raises(ProbefleetError, match="not a manifest"):
        root.open_instance("d1")


def test_names_with_dots_are_written_without(root: pins.Root) -> None:
    with new_map() as fd, root.staging("d1") as folder:
        folder.pin_map("test.rodata", fd)
        folder.write_manifest(b"")
    with root.open_instance("d1") as found:
        assert list(found.maps) == ["test.rodata"]


@pytest.mark.parametrize("name", ["", "../d1", "a/b", "new-x", "gone-x", "a.b"])
def test_names_that_lead_elsewhere_are_refused(root: pins.Root, name: str) -> None:
    with pytest.raises(ProbefleetError, match="cannot be the name"):
        root.remove(name)
    with pytest.raises(ProbefleetError, match="cannot be the name"), root.staging(name):
        pass


def test_probe_maps_and_the_agents_own_have_their_places(root: pins.Root) -> None:
    with new_map() as fd:
        with root.staging_map("uid-1") as folder:
            folder.pin_map("map", fd)
            folder.write_manifest(b"layout")
        root.pin_identity("cgroups", fd)
        number = syscall.map_info(fd).id
    assert root.list_maps() == ["uid-1"]
    with root.open_map("uid-1") as found:
        assert maps.info(found.maps["map"]).id == number
        assert found.manifest == b"layout"
    mine = root.identity_map("cgroups")
    assert mine is not None
    with mine:
        assert maps.info(mine).id == number
    assert root.identity_map("other") is None
    assert root.remove_map("uid-1") and not root.remove_map("uid-1")


def test_purge_leaves_nothing(root: pins.Root) -> None:
    build(root, "d1")
    (root.instances / "new-d3").mkdir()
    root.purge()
    assert not root.path.exists()
    root.purge()
