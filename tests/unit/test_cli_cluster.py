"""kubectl probefleet against an API server of a few lines: what is created, followed, deleted, and said of refusals."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_cli import cluster_commands, main
from probefleet_cli.failures import Failure

Json = dict[str, Any]
POLICIES = "/apis/probefleet.io/v1alpha1/namespaces/shop/probepolicies"
REPORTS = "/apis/probefleet.io/v1alpha1/namespaces/shop/probereports"
PROXY = "/api/v1/namespaces/probefleet-system/services/http:probefleet-operator:http/proxy"
QUERY = f"{PROXY}/query/v1/namespaces/shop/probepolicies/slow"
CREATED = "2026-11-23T13:00:05Z"
STATUS: Json = {"query": {"token": "t0ken"}}


class FakeServer:
    """Answers by path; keeps what was asked. An int is a status, answered with a Status object."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.requests: list[tuple[str, str, Json | None, dict[str, str]]] = []
        self.queries: list[str] = []

    def answer(self, method: str, path: str, body: Json | None) -> tuple[int, str]:
        found = self.answers.get(f"{method} {path}", 404)
        if callable(found):
            found = found(body)
        if method == "POST" and isinstance(found, dict):
            found["metadata"]["creationTimestamp"] = CREATED
        if isinstance(found, str):
            return 200, found
        if isinstance(found, int):
            return found, json.dumps({"kind": "Status", "message": f"answer {found} to {method}"})
        return 200, json.dumps(found)


@contextmanager
def serving(fake: FakeServer, folder: Path) -> Iterator[Path]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            path, _, query = self.path.partition("?")
            fake.queries.append(query)
            fake.requests.append((self.command, self.path, body, dict(self.headers)))
            status, text = fake.answer(self.command, path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        config = folder / "kubeconfig"
        cluster = {"server": f"http://127.0.0.1:{server.server_port}"}
        config.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "here",
                    "clusters": [{"name": "c", "cluster": cluster}],
                    "users": [{"name": "u", "user": {"token": "mine"}}],
                    "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}],
                }
            )
        )
        try:
            yield config
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def kubeconfig(fake: FakeServer, tmp_path: Path) -> Iterator[Path]:
    with serving(fake, tmp_path) as path:
        yield path


def call(kubeconfig: Path, *arguments: str) -> int:
    line = [*arguments, "--kubeconfig", str(kubeconfig)]
    return main.invoke(main.cluster, line, program="kubectl probefleet")


def report(*, value: int) -> Json:
    part = {"value": value, "rows": [], "other": {"rows": 0, "value": 0}}
    output = {"name": "calls", "kind": "counter", "unit": "calls", "groupBy": [], "window": part, "total": part}
    return {"kind": "ProbeReport", "status": {**STATUS, "outputs": [output], "columns": {}}}


def test_a_run_ends_with_all_that_it_counted(
    fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = yaml.safe_load((Path(__file__).parents[1] / "golden/report-calls.yaml").read_text())
    output = next(each for each in stored["outputs"] if each["name"] == "calls")
    output["window"]["value"], output["total"]["value"] = 23, 997
    stored |= STATUS

    def create(body: Json) -> Json:
        name = body["metadata"]["name"]
        for path in (f"{REPORTS}/{name}", f"{PROXY}/query/v1/namespaces/shop/probepolicies/{name}/report"):
            fake.answers[f"GET {path}"] = {"kind": "ProbeReport", "status": stored}
        fake.answers[f"DELETE {POLICIES}/{name}"] = {"kind": "Status"}
        return body

    fake.answers[f"POST {POLICIES}"] = create
    assert call(kubeconfig, "run", "syscount", "--for", "1s") == 0
    assert "calls (topk by pod, uid), since the beginning, 997" in capsys.readouterr().out


def test_a_run_creates_follows_prints_and_deletes(
    fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    created: list[Json] = []

    def create(body: Json) -> Json:
        created.append(body)
        name = body["metadata"]["name"]
        fake.answers[f"GET {REPORTS}/{name}"] = report(value=1)
        fake.answers[f"GET {PROXY}/query/v1/namespaces/shop/probepolicies/{name}/report"] = report(value=997)
        fake.answers[f"DELETE {POLICIES}/{name}"] = {"kind": "Status"}
        return body

    fake.answers[f"POST {POLICIES}"] = create
    line = ("run", "syscount", "-l", "app=web", "--set", "syscalls=read", "--for", "1s", "-o", "json")
    assert call(kubeconfig, *line) == 0
    (body,) = created
    assert [each["groupBy"] for each in body["spec"].pop("outputs")] == [["pod", "key.syscall"]] * 2
    assert body["spec"] == {
        "scope": "Namespace",
        "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": "read"}}},
        "interval": "1s",
        "ttl": "61s",
        "pods": {"selector": {"matchLabels": {"app": "web"}}},
    }
    name = body["metadata"]["name"]
    assert name.startswith("syscount-")
    printed = json.loads(capsys.readouterr().out)
    assert printed["metadata"] == {"name": name, "namespace": "shop"}
    assert printed["status"]["outputs"][0]["total"]["value"] == 997, "the live report is newer than the stored one"
    assert fake.requests[-1][:2] == ("DELETE", f"{POLICIES}/{name}")
    asked = [headers for _, path, _, headers in fake.requests if "/proxy/" in path]
    assert {headers["X-Probefleet-Token"] for headers in asked} == {"t0ken"}
    assert {headers["authorization"] for _, _, _, headers in fake.requests} == {"Bearer mine"}


def test_ctrl_c_prints_what_was_counted_and_deletes_the_policy(
    fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_commands, "POLL_SECONDS", 0.01)
    counted = iter([23, 997])

    def live(_: Json | None) -> Json:
        value = next(counted)
        if value == 23:
            os.kill(os.getpid(), signal.SIGINT)  # as the terminal does
        return report(value=value)

    def create(body: Json) -> Json:
        name = body["metadata"]["name"]
        fake.answers[f"GET {REPORTS}/{name}"] = report(value=1)
        fake.answers[f"GET {PROXY}/query/v1/namespaces/shop/probepolicies/{name}/report"] = live
        fake.answers[f"DELETE {POLICIES}/{name}"] = {"kind": "Status"}
        return body

    fake.answers[f"POST {POLICIES}"] = create
    assert call(kubeconfig, "run", "syscount", "-o", "json") == 0
    (last,) = json.loads(capsys.readouterr().out)["status"]["outputs"]
    assert last["total"]["value"] == 997, "once more after Ctrl-C"
    assert [method for method, *_ in fake.requests].count("DELETE") == 1 and fake.requests[-1][0] == "DELETE"


def test_a_policy_that_is_not_accepted_ends_with_2_and_is_deleted(
    fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def create(body: Json) -> Json:
        condition = {"type": "Accepted", "status": "False", "reason": "Invalid", "message": "unknown probe"}
        fake.answers[f"GET {POLICIES}/{body['metadata']['name']}"] = {"status": {"conditions": [condition]}}
        return body

    fake.answers[f"POST {POLICIES}"] = create
    assert call(kubeconfig, "run", "syscuont") == 2
    assert "the operator does not accept it: Invalid: unknown probe" in capsys.readouterr().err
    assert fake.requests[-1][0] == "DELETE"


def test_what_no_node_can_run_ends_with_3(
    fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = {"reason": "VerifierRefused", "nodes": 3, "message": "too many instructions"}

    def create(body: Json) -> Json:
        status = {"nodes": {"desired": 3, "failed": 3}, "failures": [failure]}
        fake.answers[f"GET {POLICIES}/{body['metadata']['name']}"] = {"status": status}
        return body

    fake.answers[f"POST {POLICIES}"] = create
    assert call(kubeconfig, "run", "syscount") == 3
    assert "VerifierRefused (3 nodes): too many instructions" in capsys.readouterr().err


def test_who_may_not_create_hears_which_right_is_missing(
    fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers[f"POST {POLICIES}"] = 403
    assert call(kubeconfig, "run", "syscount") == 1
    assert "It takes the verb create on probepolicies.probefleet.io" in capsys.readouterr().err


def test_events_are_one_a_line(fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers[f"GET {POLICIES}/slow"] = {"kind": "ProbePolicy"}
    fake.answers[f"GET {REPORTS}/slow"] = {"status": STATUS}
    pages = [
        {"output": "execs", "cursor": 2, "missed": 0, "records": [{"pid": 1, "file": "/bin/ls"}, {"pid": 2}]},
        {"output": "execs", "cursor": 5, "missed": 3, "records": []},
    ]
    fake.answers[f"GET {QUERY}/events"] = "\n".join(json.dumps(page) for page in pages) + "\n\n"
    assert call(kubeconfig, "events", "slow") == 0
    said = capsys.readouterr()
    assert said.out == "pid=1  file=/bin/ls\npid=2\n"
    assert "3 records of execs were gone" in said.err


def test_events_are_followed_over_breaks_until_the_policy_goes(
    fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_commands, "RECONNECT_SECONDS", 0)

    def page(cursor: int, *pids: int) -> str:
        records = [{"pid": pid} for pid in pids]
        return json.dumps({"output": "execs", "cursor": cursor, "missed": 0, "records": records}) + "\n"

    answers: Iterator[str | int] = iter([page(2, 1, 2) + page(3, 3), 503, page(5, 4, 5), 404])
    fake.answers[f"GET {POLICIES}/slow"] = {"kind": "ProbePolicy"}
    fake.answers[f"GET {REPORTS}/slow"] = {"status": STATUS}
    fake.answers[f"GET {QUERY}/events"] = lambda _: next(answers)
    assert call(kubeconfig, "events", "slow", "--follow") == 1
    said = capsys.readouterr()
    assert said.out == "pid=1\npid=2\npid=3\npid=4\npid=5\n"
    assert "answer 404" in said.err
    asked = [query for query in fake.queries if "follow" in query]
    assert asked == ["follow=true", *["follow=true&since=3"] * 2, "follow=true&since=5"]


def test_who_may_not_follow_hears_it_at_once(
    fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers[f"GET {POLICIES}/slow"] = {"kind": "ProbePolicy"}
    fake.answers[f"GET {REPORTS}/slow"] = {"status": STATUS}
    fake.answers[f"GET {QUERY}/events"] = 403
    assert call(kubeconfig, "events", "slow", "--follow") == 1
    assert "answer 403" in capsys.readouterr().err


def test_after_a_break_no_event_is_printed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    cursors: dict[str, int] = {}
    first: Json = {"output": "execs", "cursor": 2, "missed": 0, "records": [{"pid": 1}, {"pid": 2}]}
    again: Json = {"output": "execs", "cursor": 3, "missed": 0, "records": [{"pid": 1}, {"pid": 2}, {"pid": 3}]}
    anew: Json = {"output": "execs", "cursor": 1, "missed": 0, "records": [{"pid": 4}]}
    for page in (first, again, anew):
        cluster_commands._print_page(page, "table", cursors)
    assert capsys.readouterr().out == "pid=1\npid=2\npid=3\npid=4\n"


def test_nodes_are_a_table_with_reasons(fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers[f"GET {POLICIES}/slow"] = {"kind": "ProbePolicy"}
    fake.answers[f"GET {REPORTS}/slow"] = {"status": STATUS}
    ready = {
        "name": "n1",
        "state": "READY",
        "connected": True,
        "kernel": "6.1",
        "agent": "0.1",
        "sampleAgeSeconds": 2.0,
    }
    failed = {"name": "n2", "state": "FAILED", "connected": False, "reason": "NoAgent", "message": "no agent here"}
    fake.answers[f"GET {QUERY}/nodes"] = {"nodes": [ready, failed]}
    assert call(kubeconfig, "nodes", "slow") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["NODE", "STATE", "KERNEL", "AGENT", "SAMPLE", "REASON"],
        ["n1", "READY", "6.1", "0.1", "2s", "ago"],
        ["n2", "FAILED", "(away)", "-", "-", "-", "NoAgent"],
    ]
    assert lines[-1] == "n2: no agent here"


def test_an_unknown_policy_is_answered_with_near_names(
    fake: FakeServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers[f"GET {POLICIES}"] = {"items": [{"metadata": {"name": "slow-connects"}}]}
    assert call(kubeconfig, "nodes", "slow-conects") == 2
    err = capsys.readouterr().err
    assert "no ProbePolicy 'slow-conects' in namespace shop. Did you mean slow-connects?" in err


def test_without_a_server_it_says_which_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer(), tmp_path) as kubeconfig:
        pass
    assert call(kubeconfig, "nodes", "slow") == 1
    assert "the API server http://127.0.0.1:" in capsys.readouterr().err


def test_who_looks_into_a_namespace_is_told_the_pod() -> None:
    made = {"selector": None, "settings": {}, "interval": "1s", "ttl_seconds": 600, "namespace": "shop"}
    (output,) = cluster_commands.policy_manifest("runqlat", cluster_scope=False, **made)["spec"]["outputs"]
    assert output["groupBy"] == ["pod"]
    by = ("workload",)
    (output,) = cluster_commands.policy_manifest("runqlat", cluster_scope=False, by=by, **made)["spec"]["outputs"]
    assert output["groupBy"] == ["workload"]


def test_who_has_no_catalog_is_told_what_the_probe_has_unless_he_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise Failure("the catalog cannot be read")

    monkeypatch.setattr(cluster_commands.sources, "load_catalog", nothing)
    made = {"selector": None, "settings": {}, "interval": "1s", "ttl_seconds": 600, "namespace": "shop"}
    assert "outputs" not in cluster_commands.policy_manifest("runqlat", cluster_scope=False, **made)["spec"]
    with pytest.raises(Failure, match="the catalog cannot be read"):
        cluster_commands.policy_manifest("runqlat", cluster_scope=False, by=("pod",), **made)


def test_cluster_scope_is_asked_for_by_name() -> None:
    manifest = cluster_commands.policy_manifest(
        "runqlat", namespace="shop", selector=None, cluster_scope=True, settings={}, interval="5s", ttl_seconds=600
    )
    assert manifest["spec"] == {
        "scope": "Cluster",
        "program": {"catalog": {"name": "runqlat"}},
        "interval": "5s",
        "ttl": "600s",
    }
