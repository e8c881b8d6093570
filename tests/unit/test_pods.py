"""Whose a cgroup is, and whether its events count: yes, no, or not known yet."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_agent import pods
from probefleet_agent.pods import HOST, Answer, Book, CgroupId, Identity, PodUid, PolicyUid, Selected

UID = PodUid("0f2c5a0e-7d6c-4b0e-9c8f-1f4f53d2c1ab")
SYSTEMD_UID = UID.replace("-", "_")
OTHER = PodUid("9a1b2c3d-1111-4222-8333-444455556666")
CONTAINER = "5e" * 32

CGROUPFS = {
    "guaranteed": f"/kubepods/pod{UID}",
    "burstable": f"/kubepods/burstable/pod{UID}",
    "besteffort": f"/kubepods/besteffort/pod{UID}",
}
SYSTEMD = {
    "guaranteed": f"/kubepods.slice/kubepods-pod{SYSTEMD_UID}.slice",
    "burstable": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SYSTEMD_UID}.slice",
    "besteffort": f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SYSTEMD_UID}.slice",
}
NESTED = [
    f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{SYSTEMD_UID}.slice",
    f"/docker/1234/kubelet/kubepods/besteffort/pod{UID}",
]
POD_PATHS = [*CGROUPFS.values(), *SYSTEMD.values(), *NESTED]

MINE, THEIRS = PolicyUid("mine"), PolicyUid("theirs")
POD, OTHER_POD, UNLISTED_POD, DAEMON, STRANGER, NEVER_SEEN = (CgroupId(number) for number in (2, 3, 5, 7, 11, 13))
UNLISTED = PodUid("77777777-1111-4222-8333-444455556666")


@pytest.mark.parametrize("path", POD_PATHS)
def test_a_pod_is_read_off_its_cgroup(path: str) -> None:
    assert pods.identify(path) == Identity(UID, "")


@pytest.mark.parametrize("path", POD_PATHS)
@pytest.mark.parametrize("container", [CONTAINER, f"cri-containerd-{CONTAINER}.scope", f"crio-{CONTAINER}.scope"])
@pytest.mark.parametrize("below", ["", "/init.scope", "/system.slice/nginx.service"])
def test_a_container_is_read_off_its_cgroup_and_those_below(path: str, container: str, below: str) -> None:
    assert pods.identify(f"{path}/{container}{below}") == Identity(UID, CONTAINER)


@pytest.mark.parametrize(
    "path",
    ["/kubepods/burstable/pod{uid}", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice"],
)
def test_a_static_pods_uid_is_its_manifests_hash(path: str) -> None:
    static = "7d1c5a0e7d6c4b0e9c8f1f4f53d2c1ab"
    assert pods.identify(f"{path.format(uid=static)}/{CONTAINER}") == Identity(PodUid(static), CONTAINER)
    assert pods.identify(path.format(uid=static + "00")) == Identity(HOST, "")


@pytest.mark.parametrize(
    "path",
    ["/", "", "/kubepods", "/kubepods.slice/kubepods-burstable.slice", "/system.slice/kubelet.service", "/podman/pod1"],
)
def test_what_is_in_no_pod_is_the_host(path: str) -> None:
    assert pods.identify(path) == Identity(HOST, "")


@pytest.mark.parametrize("inner", ["crio-conmon-1.scope", "deadbeef", f"{CONTAINER}ff"])
def test_what_only_looks_like_a_container_is_the_pod_alone(inner: str) -> None:
    assert pods.identify(f"{CGROUPFS['burstable']}/{inner}") == Identity(UID, "")


@pytest.mark.parametrize("path", ["/", "/other/kubepods/pod" + UID, "/node-10/kubepods/pod" + UID])
def test_outside_this_nodes_root_is_nobody_of_ours(path: str) -> None:
    assert pods.identify(path, root="/node-1") == pods.OUTSIDE


@pytest.mark.parametrize("root", ["/node-1", "/node-1/"])
def test_inside_this_nodes_root_is_as_usual(root: str) -> None:
    assert pods.identify("/node-1", root=root) == Identity(HOST, "")
    assert pods.identify(f"/node-1{SYSTEMD['burstable']}/{CONTAINER}", root=root) == Identity(UID, CONTAINER)


@pytest.fixture
def book() -> Book:
    """One pod that ``MINE`` selects, one that it does not, one nobody told us about, a daemon, another node's pod."""
    book = Book(root="/node-1")
    learned = book.learn(
        {
            POD: f"/node-1/kubepods/pod{UID}/{CONTAINER}",
            OTHER_POD: f"/node-1/kubepods/pod{OTHER}",
            UNLISTED_POD: f"/node-1/kubepods/pod{UNLISTED}",
            DAEMON: "/node-1/system.slice/sshd.service",
            STRANGER: f"/node-2/kubepods/pod{UID}",
        }
    )
    assert learned == 5
    book.select({MINE: Selected(False, frozenset({UID}))}, [UID, OTHER])
    return book


def test_the_book_answers_yes_no_and_not_yet(book: Book) -> None:
    assert book.answer(MINE, POD) == Answer.SELECTED
    assert book.answer(MINE, OTHER_POD) == Answer.REFUSED
    assert book.answer(MINE, DAEMON) == Answer.REFUSED
    assert book.answer(MINE, STRANGER) == Answer.REFUSED
    assert book.answer(MINE, UNLISTED_POD) == Answer.UNKNOWN
    assert book.answer(MINE, NEVER_SEEN) == Answer.UNKNOWN
    assert book.answer(THEIRS, POD) == Answer.UNKNOWN


def test_everything_means_all_of_this_node_and_nothing_of_another(book: Book) -> None:
    book.select({MINE: Selected(True, frozenset())}, [])
    answers = [book.answer(MINE, cgroup) for cgroup in (POD, OTHER_POD, UNLISTED_POD, DAEMON)]
    assert answers == [Answer.SELECTED] * 4
    assert book.answer(MINE, STRANGER) == Answer.REFUSED
    assert book.answer(MINE, NEVER_SEEN) == Answer.UNKNOWN


def test_not_yet_turns_into_yes_when_the_operator_names_the_pod(book: Book) -> None:
    book.select({MINE: Selected(False, frozenset({UID, UNLISTED}))}, [UID, OTHER, UNLISTED])
    assert book.answer(MINE, UNLISTED_POD) == Answer.SELECTED


def test_a_pod_that_is_gone_goes_on_counting(book: Book) -> None:
    book.select({MINE: Selected(False, frozenset())}, [])
    assert book.answer(MINE, POD) == Answer.SELECTED


def test_another_selector_forgets_who_counted_once(book: Book) -> None:
    book.select({MINE: Selected(False, frozenset({UID}), "app=web")}, [UID, OTHER])
    for selector in ("app=web", ""):
        book.select({MINE: Selected(False, frozenset(), selector)}, [])
        assert book.answer(MINE, POD) == Answer.SELECTED, "it is gone, and what it counted stays"
    book.select({MINE: Selected(False, frozenset({OTHER}), "app=db")}, [UID, OTHER])
    assert (book.answer(MINE, POD), book.answer(MINE, OTHER_POD)) == (Answer.REFUSED, Answer.SELECTED)


def test_a_pod_whose_labels_match_no_more_is_refused_and_one_that_is_gone_is_not(book: Book) -> None:
    book.select({MINE: Selected(False, frozenset({UID, OTHER}), "app=web")}, [UID, OTHER])
    turn = book.turn(MINE)
    book.select({MINE: Selected(False, frozenset(), "app=web")}, [OTHER])
    assert (book.answer(MINE, POD), book.answer(MINE, OTHER_POD)) == (Answer.SELECTED, Answer.REFUSED)
    assert book.turn(MINE) == turn + 1
    book.select({MINE: Selected(False, frozenset())}, [UID])
    assert book.answer(MINE, POD) == Answer.SELECTED, "nobody can read the policy, so nobody knows"
    book.select({MINE: Selected(False, frozenset({OTHER}), "app=web")}, [OTHER])
    assert book.answer(MINE, OTHER_POD) == Answer.SELECTED, "it has the labels again"


def test_a_pod_that_is_gone_and_was_not_selected_stays_refused_while_something_speaks_of_it(book: Book) -> None:
    book.select({MINE: Selected(False, frozenset({UID}))}, [])
    assert book.answer(MINE, OTHER_POD) == Answer.REFUSED
    book.forget([OTHER_POD])
    book.select({MINE: Selected(False, frozenset({UID}))}, [])
    assert OTHER not in book.known_pods


def test_a_policy_that_comes_back_remembers_nothing(book: Book) -> None:
    book.select({}, [UID, OTHER])
    assert book.answer(MINE, POD) == Answer.UNKNOWN
    book.select({MINE: Selected(False, frozenset({OTHER}))}, [UID, OTHER])
    assert book.answer(MINE, POD) == Answer.REFUSED


def test_a_cgroup_never_changes_its_meaning(book: Book) -> None:
    assert book.learn({POD: f"/node-1/kubepods/pod{OTHER}"}) == 0
    assert book.identities[POD] == Identity(UID, CONTAINER)


def test_nobody_asking_is_not_known() -> None:
    assert Book().joint_answer([], POD) == Answer.UNKNOWN


def test_the_kernel_refuses_only_what_all_policies_refuse(book: Book) -> None:
    book.select({MINE: Selected(False, frozenset({UID})), THEIRS: Selected(False, frozenset({OTHER}))}, [UID, OTHER])
    assert book.joint_answer([MINE, THEIRS], POD) == Answer.SELECTED
    assert book.joint_answer([MINE, THEIRS], OTHER_POD) == Answer.SELECTED
    assert book.joint_answer([MINE, THEIRS], UNLISTED_POD) == Answer.UNKNOWN
    assert book.joint_answer([MINE, THEIRS], DAEMON) == Answer.REFUSED


@given(
    chosen=st.lists(st.frozensets(st.sampled_from([UID, OTHER, UNLISTED])), min_size=1, max_size=4),
    known=st.frozensets(st.sampled_from([UID, OTHER, UNLISTED])),
)
def test_the_joint_answer_loses_nothing_for_anybody(chosen: list[frozenset[PodUid]], known: frozenset[PodUid]) -> None:
    book = Book()
    book.learn({CgroupId(at): f"/kubepods/pod{uid}" for at, uid in enumerate((UID, OTHER, UNLISTED))})
    policies = {PolicyUid(str(at)): Selected(False, uids) for at, uids in enumerate(chosen)}
    book.select(policies, known)
    for policy, cgroup in itertools.product(policies, book.identities):
        if book.joint_answer(policies, cgroup) == Answer.REFUSED:
            assert book.answer(policy, cgroup) == Answer.REFUSED
        if book.answer(policy, cgroup) == Answer.SELECTED:
            assert book.joint_answer(policies, cgroup) == Answer.SELECTED
