"""What filters in the kernel are told: of each cgroup what its pods' policies say now, and no more than has room."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from probefleet_agent import identities
from probefleet_agent.loaded import FILTER, Loaded
from probefleet_agent.pods import Answer, CgroupId, PodUid, PolicyUid, Selected
from probefleet_agent.tracker import Tracker

MINE = PolicyUid("mine")
PODS = {CgroupId(number): PodUid(f"{number}2345678-1111-4222-8333-444455556666") for number in (1, 2, 3)}
WEB, DB, NEW = PODS.values()
Rows = npt.NDArray[np.uint8]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What the kernel's map holds."""
    content: dict[int, int] = {}

    def update(_: object, keys: Rows, values: Rows) -> None:
        content.update(zip(keys.view(np.uint64)[:, 0].tolist(), values[:, 0].tolist(), strict=True))

    monkeypatch.setattr(identities.maps, "update_many", update)
    monkeypatch.setattr(identities.maps, "read", lambda *_: (np.zeros((0, 8), np.uint8), np.zeros((0, 1), np.uint8)))
    return content


def test_a_filter_that_is_full_still_hears_what_has_changed(told: dict[int, int]) -> None:
    ours = identities.Identities(cast("Tracker", cast("Any", None)), cgroup_root="/")
    ours.book.learn({cgroup: f"/kubepods/pod{uid}" for cgroup, uid in PODS.items()})
    handle = SimpleNamespace(fd=3, info=SimpleNamespace(max_entries=2))
    loaded = cast("Loaded", SimpleNamespace(maps={FILTER: handle}, digest="d"))
    for selected, expected in (
        ({WEB}, {1: Answer.SELECTED, 2: Answer.REFUSED}),
        ({DB, NEW}, {1: Answer.REFUSED, 2: Answer.SELECTED}),
    ):
        ours.book.select({MINE: Selected(False, frozenset(selected), "app=web")}, PODS.values())
        ours.fill_filter(loaded, [MINE])
        assert told == expected
