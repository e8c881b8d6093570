"""End-to-end test 5: counting goes on, exactly, while an agent and then the operator is killed.

Each is killed once, while everything is measured that has to survive it (`surviving`).
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e import agents, kube
from tests.e2e import surviving as s

pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(400)]


def pin_shared(namespace: str) -> set[str]:
    """The first policy runs: paths of what is pinned of it, as nothing else is pinned meanwhile."""
    before = set(agents.pinned_programs(s.NODE))
    kube.apply(kube.policy("one", namespace, s.SHARED))
    kube.wait_programmed("one", namespace)
    first = set(agents.pinned_programs(s.NODE)) - before
    assert first
    return first


def join_shared(namespace: str, programs: set[str]) -> dict[str, str]:
    """The second policy has joined the first on its program; since when each counts."""
    s.call_shared("early", namespace, 997)
    s.expect_shared(namespace, "997 calls in the first one's report", one={"early": 997})
    kube.apply(kube.policy("two", namespace, {**s.SHARED, "interval": "2s"}))
    kube.wait_programmed("two", namespace)
    (digest,) = {path.rsplit("/", 2)[1] for path in programs}
    assert {path for path in agents.pinned_programs(s.NODE) if path.rsplit("/", 2)[1] == digest} == programs
    s.call_shared("late", namespace, 23)
    what = "1,020 calls for the first, 23 for the one that joined"
    s.expect_shared(namespace, what, one={"early": 997, "late": 23}, two={"late": 23})
    since = {name: kube.report(name, namespace)["since"] for name in ("one", "two")}
    assert since["one"] < since["two"]
    return since


def finish_shared(namespace: str, programs: set[str], since: dict[str, str]) -> None:
    """Both count on, each from its own beginning; the program goes with the last of them."""
    s.call_shared("later", namespace, 5)
    what = "five more for both"
    s.expect_shared(namespace, what, one={"early": 997, "late": 23, "later": 5}, two={"late": 23, "later": 5})
    assert {name: kube.report(name, namespace)["since"] for name in ("one", "two")} == since
    # Who looks in for a moment sees that moment, and not what the others have counted.
    arguments = ("--set", f"syscalls={s.SHARED_CALL[0]}", "--for", "4s", "-o", "json", "-n", namespace)
    looked = json.loads(kube.kubectl("probefleet", "run", "syscount", *arguments))["status"]
    assert looked["cost"]["sharedBy"] == 3
    assert {each["name"]: each["total"]["value"] for each in looked["outputs"]}["calls"] == 0

    kube.kubectl("delete", "ppol", "one", "-n", namespace)
    kube.eventually(lambda: not kube.report("one", namespace), "the first one's report is gone")
    kube.wait_programmed("two", namespace)
    assert set(agents.pinned_programs(s.NODE)) >= programs
    kube.kubectl("delete", "ppol", "two", "-n", namespace)
    gone = "the program is gone with its last policy"
    kube.eventually(lambda: not programs & set(agents.pinned_programs(s.NODE)), gone, seconds=30)


def test_kill_9_of_an_agent_and_then_of_the_operator_loses_and_doubles_nothing(
    namespace: str, other_namespace: str, scripts_namespace: str, plugin: Path
) -> None:
    programs = pin_shared(scripts_namespace)
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(join_shared, scripts_namespace, programs)
        script = pool.submit(s.start_script, scripts_namespace)
        with s.recording(other_namespace) as attached:
            script.result()
            since = joined.result()
            s.start_counting(namespace)
            killed, before = time.time(), s.received(other_namespace)
            agents.kill(s.NODE)
            # What the script had counted until then the operator knows, and no other.
            script = pool.submit(s.finish_script, scripts_namespace, killed)
            goes_on = before + s.SOME_RECORDS
            kube.eventually(lambda: s.received(other_namespace) > goes_on, "records of the agent that came after")
            # The operator has heard of all so far, and can list it: not one is missing, and not one is there twice.
            listed = s.listed(other_namespace)
            assert listed == list(range(len(listed)))
            assert len(listed) + 23 > goes_on
            script.result()

            # All until now, once more; and both go on, so that the operator is missed.
            listed = s.listed(other_namespace)
            assert listed == list(range(len(listed)))
            operator = ("-n", kube.SYSTEM, "-l", "app.kubernetes.io/component=operator", "--grace-period=0", "--force")
            kube.kubectl("delete", "pod", *operator)
            shared = pool.submit(finish_shared, scripts_namespace, programs, since)
            listed = s.finish_recording(other_namespace, attached)
            s.finish_counting(namespace)
        # What the one before had acknowledged is in the total; the others can be listed, none of them twice.
        assert listed == list(range(997 - len(listed), 997))
        assert listed
        shared.result()
