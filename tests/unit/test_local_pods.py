"""Pods of one machine: what the container runtime and the kubelet's folders tell, who is chosen, and what is said where
nobody can tell. The runtime is a fake behind a real socket."""

from __future__ import annotations

import socket as socketlib
import string
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_cli import container_runtime, local_choice, local_pods, pod_watch, preparation, selectors
from probefleet_cli.failures import BadInput
from probefleet_core import policy, result, values
from probefleet_wire.cri import runtime_pb2

from tests.fakes.container_runtime import FakeRuntime, serving

WEB, DB, OLD = (f"0f1e2d3c-0000-4000-8000-00000000000{number}" for number in (1, 2, 3))
STATIC = "7d1c5a0e7d6c4b0e9c8f1f4f53d2c1ab"
CONTAINER = "ab" * 32


@pytest.fixture
def fake() -> FakeRuntime:
    fake = FakeRuntime()
    labels = {"app": "web", "env": "a", "pod-template-hash": "7d9f"}
    fake.add(WEB, "shop", "web-7d9f-x2x4z", labels, "nginx", "log")
    fake.add(DB, "shop", "db-0", {"app": "db", "tier": "db"}, "postgres")
    fake.add(STATIC, "kube-system", "etcd-node1", {"component": "etcd"}, "etcd")
    return fake


@pytest.fixture
def socket(fake: FakeRuntime, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cri.sock"
    with serving(path, fake):
        yield path


def nobody() -> local_pods.LocalPods:
    """The kubelet's folders of a machine that has none."""
    return local_pods.LocalPods()


# The runtime.


def test_pods_have_their_names_labels_containers_and_workloads(fake: FakeRuntime, socket: Path) -> None:
    with container_runtime.find(str(socket)) as runtime:
        assert runtime.name == "fake 0"
        found = local_pods.of_runtime(runtime.pods())
    web = found.names[WEB]
    assert (web.namespace, web.name, web.workload_kind, web.workload) == ("shop", "web-7d9f-x2x4z", "Deployment", "web")
    assert sorted(web.containers.values()) == ["log", "nginx"]
    assert found.labels[WEB]["app"] == "web"
    assert found.namespaces == ("kube-system", "shop")
    assert found.chosen("kube-system") == (STATIC,)
    assert set(fake.calls) == {"Version", "ListPodSandbox", "ListContainers"}, "nothing that changes anything"


def test_of_a_pod_with_several_sandboxes_the_newest_counts(fake: FakeRuntime, socket: Path) -> None:
    fake.add(DB, "shop", "db-0", {"app": "older"}, "before", created_at=0)
    with container_runtime.find(str(socket)) as runtime:
        found = local_pods.of_runtime(runtime.pods())
    assert found.labels[DB]["app"] == "db"
    assert sorted(found.names[DB].containers.values()) == ["before", "postgres"], "what it counted has a name, too"


def test_what_is_no_identity_is_left_out(fake: FakeRuntime, socket: Path) -> None:
    for uid, namespace, name in (
        ("../../etc", "shop", "a"), ("", "shop", "a"), (OLD, "Shop", "a"), (OLD, "shop", "a_b"), (OLD, "", ""),
    ):  # fmt: skip
        fake.add(uid, namespace, name, {"app": "web"})
    fake.containers.append(runtime_pb2.Container(id="short", pod_sandbox_id=fake.sandboxes[0].id))
    with container_runtime.find(str(socket)) as runtime:
        assert {each.uid for each in runtime.pods()} == {WEB, DB, STATIC}


def test_the_first_that_speaks_cri_is_taken_and_without_any_each_is_said(fake: FakeRuntime, tmp_path: Path) -> None:
    absent, file, off, good = (tmp_path / name for name in ("absent", "file", "off", "good"))
    file.touch()
    with serving(off, None), serving(good, fake):
        with container_runtime.find(None, places=[absent, file, off, good]) as runtime:
            assert runtime.socket == good
        with pytest.raises(container_runtime.NoRuntime) as none:
            container_runtime.find(None, places=[absent, file, off])
    assert str(none.value).splitlines() == [
        f"  {absent}: is not there",
        f"  {file}: is no socket",
        f"  {off}: speaks no CRI v1 (its CRI plugin is off, or it is older than containerd 1.6 or CRI-O 1.23)",
    ]
    left = tmp_path / "left"
    with socketlib.socket(socketlib.AF_UNIX) as dead:
        dead.bind(str(left))
    with pytest.raises(container_runtime.NoRuntime, match="does not answer: Connection refused"):
        container_runtime.find(str(left))


def test_a_runtime_that_does_not_answer_in_time_or_too_much_is_said(
    fake: FakeRuntime, socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with container_runtime.find(str(socket)) as runtime:
        monkeypatch.setattr(container_runtime, "ANSWER_SECONDS", 0.05)
        fake.answers.clear()
        with pytest.raises(container_runtime.NoAnswer, match=r"does not answer within 0\.05 s"):
            runtime.pods()
        fake.answers.set()
        monkeypatch.setattr(container_runtime, "ANSWER_SECONDS", 20.0)
        fake.add(OLD, "shop", "big", {"x": "y" * container_runtime.MAX_ANSWER_BYTES})
        with pytest.raises(container_runtime.NoAnswer, match="answers with more than 16 MiB"):
            runtime.pods()


@pytest.mark.parametrize("endpoint", ["unix:///run/x.sock", "unix:/run/x.sock", "/run/x.sock"])
def test_endpoints_are_written_as_crictl_takes_them(endpoint: str) -> None:
    assert container_runtime.socket_of(endpoint) == Path("/run/x.sock")


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:1", "npipe:////./pipe/x", "x.sock", "unix://"])
def test_what_is_no_unix_socket_is_refused(endpoint: str) -> None:
    with pytest.raises(BadInput, match="this is no unix socket"):
        container_runtime.socket_of(endpoint)


# Names.


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("web-7d9f-x2x4z", {"pod-template-hash": "7d9f"}, ("Deployment", "web")),
        ("web-7d9f-x2x4z", {"pod-template-hash": "aaaa"}, ("Pod", "web-7d9f-x2x4z")),
        ("db-0", {"statefulset.kubernetes.io/pod-name": "db-0"}, ("StatefulSet", "db")),
        ("log-x2x4z", {"controller-revision-hash": "1", "pod-template-generation": "1"}, ("DaemonSet", "log")),
        ("db-x2x4z", {"controller-revision-hash": "1"}, ("Pod", "db-x2x4z")),
        ("night-29-x2x4z", {"batch.kubernetes.io/job-name": "night-29"}, ("Job", "night-29")),
        ("bare", {"app": "web"}, ("Pod", "bare")),
    ],
)
def test_a_workload_is_read_off_its_controllers_labels_or_not_at_all(
    name: str, labels: dict[str, str], expected: tuple[str, str]
) -> None:
    assert local_pods.workload_of(name, labels) == expected


NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=3)
PODS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(["a", "b"]), st.dictionaries(NAMES, NAMES, max_size=2)),
    max_size=5,
)


@given(PODS, PODS)
def test_what_was_known_once_stays_known_and_what_is_newer_counts(
    first: dict[str, tuple[str, dict[str, str]]], second: dict[str, tuple[str, dict[str, str]]]
) -> None:
    def seen(pods: dict[str, tuple[str, dict[str, str]]]) -> local_pods.LocalPods:
        return local_pods.of_runtime(
            local_pods.Sandbox(uid, namespace, uid, labels) for uid, (namespace, labels) in pods.items()
        )

    both = seen(first).then(seen(second))
    assert both == both.then(seen(second)), "seeing it again changes nothing"
    assert {uid: (pod.namespace, dict(both.labels[uid])) for uid, pod in both.names.items()} == {**first, **second}


def test_what_the_kubelet_wrote_takes_no_workload_away() -> None:
    told = local_pods.of_runtime([local_pods.Sandbox(WEB, "shop", "web-7d9f-x2x4z", {"pod-template-hash": "7d9f"})])
    wrote = local_pods.LocalPods({WEB: result.PodName("shop", "web-7d9f-x2x4z", containers={CONTAINER: "nginx"})})
    both = told.then(wrote).names[WEB]
    assert (both.workload, both.containers) == ("web", {CONTAINER: "nginx"})


def test_no_more_pods_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_pods, "MAX_REMEMBERED", 3)
    pods = local_pods.LocalPods()
    for number in range(5):
        pods = pods.then(local_pods.of_runtime([local_pods.Sandbox(f"p{number}", "a", f"p{number}", {})]))
    assert list(pods.names) == list(pods.labels) == ["p2", "p3", "p4"], "the oldest are forgotten"


# Who is chosen.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("app=web", {WEB}),
        ("app=web,tier!=db", {WEB}),
        ("tier!=db", {WEB, STATIC}),
        ("app in (web,db)", {WEB, DB}),
        ("app in(web, db),!tier", {WEB}),
        ("app notin (db)", {WEB, STATIC}),
        ("component", {STATIC}),
        ("!app", {STATIC}),
        ("app=web,app=db", set()),
    ],
)
def test_labels_choose_as_kubectl_would(fake: FakeRuntime, socket: Path, text: str, expected: set[str]) -> None:
    with container_runtime.find(str(socket)) as runtime:
        found = local_pods.of_runtime(runtime.pods())
    choice = selectors.Choice.of(None, text)
    assert set(found.chosen("", choice.labels)) == expected
    assert set(found.chosen("shop", choice.labels)) == expected - {STATIC}


def test_whose_labels_nobody_knows_is_not_chosen_by_them() -> None:
    wrote = local_pods.LocalPods({WEB: result.PodName("shop", "web")})
    assert wrote.chosen("shop") == (WEB,)
    assert wrote.chosen("shop", selectors.selector("!old")) == ()


def parsed(**spec: object) -> values.ProbePolicy:
    made = {
        "apiVersion": policy.API_VERSION, "kind": "ProbePolicy", "metadata": {"name": "x", "namespace": "shop"},
        "spec": {"program": {"catalog": {"name": "syscount"}}, **spec},
    }  # fmt: skip
    return policy.parse_policy(made)


def test_options_narrow_what_the_policy_selects(fake: FakeRuntime, socket: Path) -> None:
    with container_runtime.find(str(socket)) as runtime:
        pods = local_pods.of_runtime(runtime.pods())

    def selected(choice: selectors.Choice, **spec: object) -> tuple[str, ...] | None:
        return preparation.selected(choice.narrow(parsed(**spec)), pods, choice.namespace)

    everybody, web = selectors.Choice(), {"selector": {"matchLabels": {"app": "web"}}}
    assert selected(everybody, scope="Cluster") is None
    assert selected(everybody, scope="Cluster", pods=web) == (WEB,)
    assert selected(everybody) == (WEB, DB)
    assert selected(everybody, pods=web) == (WEB,)
    assert selected(selectors.Choice.of("kube-system", None), scope="Cluster") == (STATIC,)
    assert selected(selectors.Choice.of("shop", "app"), scope="Cluster") == (WEB, DB)
    assert selected(selectors.Choice.of(None, "app"), scope="Cluster", pods=web) == (WEB,)
    assert selected(selectors.Choice.of(None, "app=db"), scope="Cluster", pods=web) == ()


def test_nobody_is_judged_by_labels_that_have_not_been_told_yet() -> None:
    """The kubelet's folders name a pod before the runtime does: it is neither wanted nor refused until then."""
    wrote = local_pods.LocalPods({WEB: result.PodName("shop", "web"), DB: result.PodName("shop", "db")})
    told = wrote.then(local_pods.LocalPods(wrote.names, {WEB: {"app": "web"}}))

    def judged(known: local_pods.LocalPods, **spec: object) -> frozenset[str]:
        prepared = SimpleNamespace(policy=parsed(**spec))
        return preparation.judged([prepared], known, None)  # type: ignore[list-item]

    by_label = {"selector": {"matchLabels": {"app": "db"}}}
    assert judged(wrote, pods=by_label) == set()
    assert judged(told, pods=by_label) == {WEB}
    assert judged(wrote) == {WEB, DB}, "no label is asked for"


# While it runs.


def test_pods_that_come_are_found_and_those_that_go_keep_their_names(fake: FakeRuntime, socket: Path) -> None:
    with container_runtime.find(str(socket)) as runtime:
        watch = pod_watch.Watch(runtime, folders=nobody)
        watch.look()
        before = watch.pods
        fake.remove("db-0")
        fake.add(OLD, "shop", "late", {"app": "late"})
        watch.look()
        assert before.chosen() == (WEB, DB, STATIC)
        assert watch.pods.chosen() == (WEB, DB, OLD, STATIC)
        assert watch.pods.chosen("", selectors.selector("app in (db,late)")) == (DB, OLD)


def test_a_watch_looks_by_itself(fake: FakeRuntime, socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_watch, "LOOK_SECONDS", 0.01)
    with pod_watch.following(f"unix://{socket}") as watch:
        seen = fake.calls.count("ListContainers")
        fake.answers.clear()  # the next look stands still until the pod is there
        fake.add(OLD, "shop", "late", {})
        fake.answers.set()
        watch.look()
        assert OLD in watch.pods.names and fake.calls.count("ListContainers") > seen


def test_silence_is_noted_and_what_is_known_stays(fake: FakeRuntime, socket: Path) -> None:
    with container_runtime.find(str(socket)) as runtime:
        watch = pod_watch.Watch(runtime, folders=nobody)
        watch.look()
        assert watch.silence is None
        fake.refuses = grpc.StatusCode.UNAVAILABLE
        watch.look()
        assert watch.silence == "does not answer: refused by the test"
        assert watch.pods.chosen("shop") == (WEB, DB)
        fake.refuses = None
        watch.look()
        assert watch.silence is None


# What is said.


def of(found: values.ProbePolicy) -> list[preparation.Prepared]:
    return [preparation.Prepared("policy.yaml", found, None)]  # type: ignore[arg-type]  # no plan is looked at


NONE = container_runtime.NoRuntime([(Path("/run/x.sock"), "is not there")])


def test_labels_without_a_runtime_are_refused_with_what_to_do() -> None:
    watch = pod_watch.Watch(None, without=NONE, folders=nobody)
    watch.look()
    with pytest.raises(BadInput) as said:
        local_choice.check(of(parsed(pods={"selector": {"matchLabels": {"a": "b"}}})), watch, selectors.Choice())
    words = "policy.yaml: spec.pods.selector: which pods have these labels is for the container runtime to say"
    assert str(said.value).startswith(words)
    assert "/run/x.sock: is not there" in str(said.value) and "--runtime-endpoint" in str(said.value)
    choice = selectors.Choice.of("shop", "app=web")
    with pytest.raises(BadInput, match=r"^-n shop -l app=web: which pods"):
        local_choice.check(of(choice.narrow(parsed())), watch, choice)
    choice = selectors.Choice.of("shop", None)
    with pytest.raises(BadInput, match="there are no pods on this machine, as far as it can be seen"):
        local_choice.check(of(choice.narrow(parsed())), watch, choice)


def test_a_policy_of_a_namespace_that_is_not_here_says_so_before_anybody_waits() -> None:
    watch = pod_watch.Watch(None, without=NONE, folders=nobody)
    watch.look()
    assert local_choice.check(of(parsed()), watch, selectors.Choice()) == (
        "policy.yaml: it counts pods of namespace shop only, and none is on this machine yet. "
        "scope: Cluster counts all that runs here, -n NAMESPACE the pods of another namespace"
    )
    assert local_choice.check(of(parsed(scope="Cluster")), watch, selectors.Choice()) is None


def test_a_namespace_is_known_without_a_runtime() -> None:
    wrote = local_pods.LocalPods({WEB: result.PodName("shop", "web")})
    watch = pod_watch.Watch(None, without=NONE, folders=lambda: wrote)
    watch.look()
    choice = selectors.Choice.of("shop", None)
    assert local_choice.check(of(choice.narrow(parsed())), watch, choice) is None
    choice = selectors.Choice.of("shpo", None)
    said = local_choice.check(of(choice.narrow(parsed())), watch, choice)
    assert said == "-n shpo: no such pod is here yet; any that comes is counted. Namespaces with pods here: shop"


def test_a_named_runtime_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no container runtime answers there"):
        with pod_watch.following(str(tmp_path / "no.sock")):
            pass


def test_a_program_that_cannot_tell_pods_apart_is_refused_with_the_options() -> None:
    from probefleet_cli import sources
    from probefleet_core import catalog

    source = "BPF_HASH(a, u32);\nTRACEPOINT_PROBE(syscalls, sys_enter_execve) { u32 k = 1; a.increment(k); return 0; }"
    manifest = {
        "apiVersion": policy.API_VERSION, "kind": "ProbePolicy", "metadata": {"name": "x"},
        "spec": {"scope": "Cluster", "program": {"bcc": {"source": source}}},
    }  # fmt: skip
    given = [sources.Source("x.yaml", manifest)]
    known = catalog.Catalog({})
    assert preparation.prepare(given, catalog=known)
    with pytest.raises(BadInput, match=r"x\.yaml, -n shop: .*\n.*does not call probefleet_selected"):
        preparation.prepare(given, catalog=known, choice=selectors.Choice.of("shop", None))
